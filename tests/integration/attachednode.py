"""The gateway's side of a node: a real gRPC client that speaks Attach, without any builds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import grpc

from offload_core.versions import call_metadata
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import events_pb2 as events_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from offload_core.tls import KeyPair
    from tests.fixtures.gateway import RunningGateway

WAIT_SECONDS = 10.0


class AttachedNode:
    """Attaches, beats, and answers offers as it is told. Use as an async context manager."""

    def __init__(
        self,
        gateway: RunningGateway,
        node_id: str,
        keys: KeyPair,
        *,
        accepts: bool = True,
        answers: bool = True,
        beats: bool = True,
        **hello: Any,
    ) -> None:
        self.gateway, self.node_id, self.keys = gateway, node_id, keys
        self.accepts, self.answers, self.beats = accepts, answers, beats
        defaults = {"slots": 1, "platforms": ["linux/amd64"], "version": "test"}
        self.hello = nodes_pb.Hello(**defaults | hello)
        self.welcome = nodes_pb.Welcome()
        self.offers: list[str] = []
        self.cancelled: dict[str, str] = {}
        self.running = 0
        self.revoked: set[str] = set()
        self.limits: list[nodes_pb.ProjectLimits] = []
        self.tasks: list[nodes_pb.CacheTask] = []
        self.answer: Callable[[nodes_pb.CacheTask], nodes_pb.CacheTaskReply] | None = None
        """Answers cache tasks; without it the node is silent."""
        self.ended: grpc.aio.AioRpcError | None = None
        self._outbox: asyncio.Queue[nodes_pb.AttachRequest | None] = asyncio.Queue()
        self._welcomed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        stub = NodesServiceStub(await self.gateway.channel(self.keys))
        self._outbox.put_nowait(nodes_pb.AttachRequest(hello=self.hello))
        self._call = stub.Attach(self._requests(), metadata=call_metadata())
        self._tasks = [
            asyncio.create_task(self._read(), name="read"),
            asyncio.create_task(self._beat(), name="beat"),
        ]
        await self.eventually(lambda: self._welcomed.is_set() or self.ended is not None)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.vanish()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def vanish(self) -> None:
        """Break the stream without a word."""
        self._call.cancel()

    async def eventually(self, condition: Any) -> None:
        """Wait until something is true."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                await asyncio.sleep(0.005)

    def send(self, **message: Any) -> None:
        self._outbox.put_nowait(nodes_pb.AttachRequest(**message))

    def update(self, build_id: str, state: builds_pb.BuildState.ValueType, **values: Any) -> None:
        self.send(build_update=nodes_pb.BuildUpdate(build_id=build_id, state=state, **values))

    def log(self, build_id: str, first: int, last: int) -> None:
        batches = [
            events_pb.ProgressBatch(
                sequence=number, logs=[events_pb.VertexLog(vertex="v", data=b"line %d\n" % number)]
            )
            for number in range(first, last + 1)
        ]
        self.send(build_log=nodes_pb.BuildLog(build_id=build_id, batches=batches))

    async def _requests(self) -> AsyncIterator[nodes_pb.AttachRequest]:
        while (message := await self._outbox.get()) is not None:
            yield message

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.beats:
                self.send(heartbeat=self.heartbeat())

    def heartbeat(self) -> nodes_pb.Heartbeat:
        """Return its state."""
        return nodes_pb.Heartbeat(running=self.running)

    def take_session_task(self, task: nodes_pb.SessionTask) -> None:
        """Take work on a session; this node does none."""

    async def _read(self) -> None:
        try:
            async for message in self._call:
                kind = message.WhichOneof("message")
                if kind == "welcome":
                    self.welcome = message.welcome
                    self._welcomed.set()
                elif kind == "offer":
                    self.offers.append(message.offer.build_id)
                    if self.answers:
                        self.reply(message.offer.build_id, accepted=self.accepts)
                elif kind == "cancel_build":
                    self.cancelled[message.cancel_build.build_id] = message.cancel_build.reason
                elif kind == "project_limits":
                    self.limits.append(message.project_limits)
                elif kind == "revocations":
                    self.revoked = {item.token_id for item in message.revocations.revocations}
                elif kind == "cache_task":
                    self.tasks.append(message.cache_task)
                    if self.answer is not None:
                        reply = self.answer(message.cache_task)
                        reply.task_id = message.cache_task.task_id
                        self.send(cache_task_reply=reply)
                elif kind == "session_task":
                    self.take_session_task(message.session_task)
        except grpc.aio.AioRpcError as error:
            self.ended = error

    def reply(self, build_id: str, *, accepted: bool) -> None:
        reason = "" if accepted else "the disk is full"
        self.send(
            offer_reply=nodes_pb.OfferReply(build_id=build_id, accepted=accepted, reason=reason)
        )

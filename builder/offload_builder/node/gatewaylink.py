"""The node's standing connection to its gateway: heartbeats, offers, news and logs of builds."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

import grpc
import structlog

from offload_core.errors import AuthenticationError, GatewayUnreachableError, OffloadError
from offload_core.status import error_from_rpc
from offload_core.tls import GATEWAY_NAME, open_channel
from offload_core.trust import fingerprints
from offload_core.versions import call_metadata
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.nodes_service_pb2 import (
    AttachRequest,
    BuildLog,
    BuildUpdate,
    Heartbeat,
    Hello,
    OfferReply,
)
from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from offload_builder.node.journal import Journal
    from offload_core.tls import KeyPair
    from offload_proto.v1.nodes_service_pb2 import (
        AttachResponse,
        CacheTask,
        CacheTaskReply,
        ProjectLimits,
        SessionUpdate,
    )
    from offload_proto.v1.nodes_service_pb2_grpc import NodesServiceAsyncStub

log = structlog.get_logger(__name__)

OUTBOX_MESSAGES = 64
"""Pieces of logs are of up to 256 KiB, so at most 16 MiB wait for a slow gateway."""
RECONNECT_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
RESEND_SECONDS = 120.0
"""News of an end is sent again over a new stream for so long: the old one may have lost it."""
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    # Not gRPC's two minutes, for which a gateway that is back would wait for its nodes.
    ("grpc.max_reconnect_backoff_ms", 5000),
)
CACHE_TASKS = 4
"""Questions about the layer cache that are worked on at once."""
ROOM_SECONDS = 10.0
"""For a gateway that reads slowly, while an answer waits for its turn."""
_SEND_SECONDS = 0.1
_SOON_SECONDS = 0.2
"""The gateway knows by its own offer that a build begins. Each message costs both sides a
millisecond, which builds of a tenth of a second feel."""
_GATHER_SECONDS = 0.1
"""What is printed meanwhile goes to the history together."""
_GATHER_BYTES = 64 << 10
"""After more than that there is much, and the next message follows at once."""
_FLUSH_POLL_SECONDS = 0.01
_FINAL = (
    BuildState.BUILD_STATE_SUCCEEDED,
    BuildState.BUILD_STATE_FAILED,
    BuildState.BUILD_STATE_CANCELED,
)


_Outbox = asyncio.Queue[tuple[AttachRequest | None, asyncio.Event | None]]
"""Messages, and events that are set when everything before them was written."""


class NodeState(Protocol):
    """What the link needs to know of the node."""

    def hello(self) -> Hello:
        """Introduce the node."""

    def heartbeat(self) -> Heartbeat:
        """Describe the node now."""

    def trust_gateway(self, ticket_key_pem: bytes) -> None:
        """Take the gateway's ticket key."""

    def expect_projects(self, project_ids: Sequence[str]) -> None:
        """Hear which projects will probably build here."""

    def offer(self, build_id: str, project_id: str, hold_seconds: float) -> str:
        """Reserve a slot; return why not, or an empty text."""

    def cancel(self, build_id: str, reason: str) -> None:
        """End a build or give back its slot."""

    def limit_projects(self, limits: ProjectLimits) -> None:
        """Take the bounds of all projects that have some."""

    async def cache_task(self, task: CacheTask) -> CacheTaskReply:
        """Do work on the layer cache; what goes wrong is in the answer."""


class GatewayLink:
    """Keeps the stream open for as long as the node serves.

    News of builds is kept until it was written to a stream: the last update of each build, and
    the journals of running builds, which are sent again from the start after a reconnect (the
    gateway drops what it has by sequence number). The ends of builds are repeated after a
    reconnect, too, because a stream that breaks may lose what was written last.
    """

    def __init__(self, address: str, keys: KeyPair, state: NodeState) -> None:
        self._address = address
        self._keys = keys
        self._authorities = fingerprints(keys.ca_pem)
        self._state = state
        self._updates: dict[str, BuildUpdate] = {}
        self._ended: dict[str, tuple[float, BuildUpdate]] = {}
        self._sessions: dict[str, SessionUpdate] = {}
        self._unwritten = 0
        self._journals: dict[str, tuple[Journal, asyncio.Event]] = {}
        self._changed = asyncio.Event()
        self.handlers: dict[str, Callable[[AttachResponse], None]] = {}
        """Who takes further kinds of messages, by the name of their field."""
        self.connected = asyncio.Event()
        self._outbox: _Outbox | None = None
        self._cache_slots = asyncio.Semaphore(CACHE_TASKS)

    def report(self, update: BuildUpdate) -> None:
        """Send an update as soon as there is a connection.

        What a former one says that was not sent yet, and this one does not, is sent with it.
        """
        self._keep(update)
        self._changed.set()

    def report_soon(self, update: BuildUpdate) -> None:
        """Send an update within a fraction of a second, with what follows until then."""
        self._keep(update)
        self._change_soon()

    def report_session(self, update: SessionUpdate) -> None:
        """Send news of a session as soon as there is a connection, the last one of each.

        What a stream loses is in the introduction over the next one.
        """
        self._sessions[update.session_id] = update
        self._changed.set()

    def _keep(self, update: BuildUpdate) -> None:
        waiting = self._updates.setdefault(update.build_id, update)
        if waiting is not update:
            if update.steps:
                del waiting.steps[:]
            waiting.MergeFrom(update)

    def _change_soon(self) -> None:
        asyncio.get_running_loop().call_later(_SOON_SECONDS, self._changed.set)

    def post(self, message: AttachRequest) -> bool:
        """Send a message that is worth nothing later; False when it cannot go now."""
        if self._outbox is None or self._outbox.full() or not self.connected.is_set():
            return False
        self._outbox.put_nowait((message, None))
        return True

    async def send(self, message: AttachRequest) -> bool:
        """Send a message over the stream that is open now, in its turn; False where none is."""
        outbox = self._outbox
        if outbox is None or not self.connected.is_set():
            return False
        try:
            async with asyncio.timeout(ROOM_SECONDS):
                await outbox.put((message, None))
        except TimeoutError:
            return False
        return True

    def beat(self) -> None:
        """Send a heartbeat now, because something changed."""
        self._changed.set()

    async def send_log(self, build_id: str, journal: Journal) -> None:
        """Stream a journal to the history until it is finished and sent; survives reconnects."""
        done = asyncio.Event()
        self._journals[build_id] = (journal, done)
        self._change_soon()
        try:
            await done.wait()
        finally:
            self._journals.pop(build_id, None)

    async def flush(self, timeout: float) -> None:
        """Wait until all news was written to the stream, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._updates or self._sessions or self._unwritten:  # noqa: ASYNC110 - only while stopping
                    await asyncio.sleep(_FLUSH_POLL_SECONDS)
                # Written is not yet sent, and the stream is cancelled next.
                await asyncio.sleep(_SEND_SECONDS)

    def use(self, keys: KeyPair) -> None:
        """Attach with another certificate from the next time on; an open stream stays."""
        self._keys = keys
        self._authorities = fingerprints(keys.ca_pem)
        self.beat()

    async def run(self) -> None:
        """Attach, and attach again after every loss, until cancelled.

        Raises:
            AuthenticationError: the gateway no longer accepts this node.
        """
        failures = 0
        while True:
            keys = self._keys
            async with open_channel(
                self._address,
                GATEWAY_NAME,
                ca_pem=keys.ca_pem,
                keys=keys,
                options=CHANNEL_OPTIONS,
            ) as channel:
                failures = await self._attach_until_renewed(channel, keys, failures)

    async def _attach_until_renewed(
        self, channel: grpc.aio.Channel, keys: KeyPair, failures: int
    ) -> int:
        """Attach with one certificate until there is another; return the failures in a row."""
        while self._keys is keys:
            try:
                await self._attach(NodesServiceStub(channel))
                error: OffloadError | None = None
            except* grpc.RpcError as group:
                error = _first(group, self._address)
            except* OSError as group:
                error = GatewayUnreachableError(f"the link to the gateway broke: {group}")
            was_connected = self.connected.is_set()
            self.connected.clear()
            if isinstance(error, AuthenticationError):
                raise error
            failures = 0 if was_connected else failures + 1
            delay = RECONNECT_SECONDS[min(failures, len(RECONNECT_SECONDS) - 1)]
            log.warning(
                "gateway.lost", address=self._address, error=str(error), retry_seconds=delay
            )
            await asyncio.sleep(delay)
        return failures

    async def _attach(self, stub: NodesServiceAsyncStub) -> None:
        outbox: _Outbox = asyncio.Queue(OUTBOX_MESSAGES)
        self._outbox = outbox
        await outbox.put((AttachRequest(hello=self._state.hello()), None))
        for build_id, (_, update) in self._recently_ended().items():
            self._updates.setdefault(build_id, update)
        self._unwritten = 0
        call = stub.Attach(self._drain(outbox), metadata=call_metadata())
        async with asyncio.TaskGroup() as tasks:
            sender: asyncio.Task[None] | None = None
            working: set[asyncio.Task[None]] = set()
            try:
                async for message in call:
                    if message.WhichOneof("message") == "welcome":
                        self._state.trust_gateway(message.welcome.ticket_public_key_pem)
                        self._state.expect_projects(message.welcome.recent_project_ids)
                        interval = message.welcome.heartbeat_interval
                        seconds = interval.seconds + interval.nanos / 1e9
                        sender = tasks.create_task(self._send(outbox, seconds or 2.0))
                        self.connected.set()
                        log.info("gateway.attached", address=self._address)
                    else:
                        await self._answer(message, outbox, tasks, working)
            finally:
                call.cancel()
                for task in (sender, *working):
                    if task is not None:
                        task.cancel()

    def _recently_ended(self) -> dict[str, tuple[float, BuildUpdate]]:
        limit = asyncio.get_running_loop().time() - RESEND_SECONDS
        self._ended = {key: value for key, value in self._ended.items() if value[0] > limit}
        return self._ended

    async def _drain(self, outbox: _Outbox) -> AsyncIterator[AttachRequest]:
        """Yield what is to be sent; gRPC asks for the next message after it wrote the last."""
        while True:
            message, written = await outbox.get()
            if message is not None:
                yield message
            if written is not None:
                written.set()
            self._unwritten = outbox.qsize()

    async def _answer(
        self,
        message: AttachResponse,
        outbox: _Outbox,
        tasks: asyncio.TaskGroup,
        working: set[asyncio.Task[None]],
    ) -> None:
        kind = message.WhichOneof("message")
        if kind == "offer":
            offer = message.offer
            hold = offer.hold.seconds + offer.hold.nanos / 1e9
            reason = self._state.offer(offer.build_id, offer.project_id, hold)
            reply = OfferReply(build_id=offer.build_id, accepted=not reason, reason=reason)
            await outbox.put((AttachRequest(offer_reply=reply), None))
        elif kind == "cancel_build":
            self._state.cancel(message.cancel_build.build_id, message.cancel_build.reason)
        elif kind == "project_limits":
            self._state.limit_projects(message.project_limits)
        elif kind == "cache_task":
            # Offers must not wait for it.
            work = tasks.create_task(self._work(message.cache_task, outbox))
            working.add(work)
            work.add_done_callback(working.discard)
        elif kind is not None and kind in self.handlers:
            self.handlers[kind](message)

    async def _work(self, task: CacheTask, outbox: _Outbox) -> None:
        async with self._cache_slots:
            reply = await self._state.cache_task(task)
        await outbox.put((AttachRequest(cache_task_reply=reply), None))

    async def _send(self, outbox: _Outbox, interval: float) -> None:
        sending: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                heartbeat = self._state.heartbeat()
                heartbeat.authorities.extend(self._authorities)
                await outbox.put((AttachRequest(heartbeat=heartbeat), None))
                for build_id, update in list(self._updates.items()):
                    self._unwritten += 1
                    await outbox.put((AttachRequest(build_update=update), None))
                    if self._updates.get(build_id) is update:
                        del self._updates[build_id]
                    if update.state in _FINAL:
                        now = asyncio.get_running_loop().time()
                        self._recently_ended()[build_id] = (now, update)
                for session_id, news in list(self._sessions.items()):
                    self._unwritten += 1
                    await outbox.put((AttachRequest(session_update=news), None))
                    if self._sessions.get(session_id) is news:
                        del self._sessions[session_id]
                for build_id, (journal, done) in self._journals.items():
                    if build_id not in sending:
                        sending[build_id] = tasks.create_task(
                            _send_journal(outbox, build_id, journal, done)
                        )
                for build_id in [key for key in sending if key not in self._journals]:
                    if sending[build_id].done():
                        del sending[build_id]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval):
                        await self._changed.wait()


async def _send_journal(
    outbox: _Outbox, build_id: str, journal: Journal, done: asyncio.Event
) -> None:
    async with aclosing(journal.read()) as runs:
        async for batches in runs:
            message = BuildLog(build_id=build_id, batches=batches)
            await outbox.put((AttachRequest(build_log=message), None))
            if message.ByteSize() < _GATHER_BYTES:
                await _gather(journal)
    await outbox.put((None, done))


async def _gather(journal: Journal) -> None:
    """Wait a while for more of a journal, but not beyond its end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GATHER_SECONDS):
            await journal.finished.wait()


def _first(group: BaseExceptionGroup[grpc.RpcError], address: str) -> OffloadError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error_from_rpc(
        error,  # type: ignore[arg-type]
        peer=f"the gateway at {address}",
        unreachable=GatewayUnreachableError,
    )

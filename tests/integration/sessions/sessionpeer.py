"""A node that takes sessions, as the gateway sees it, and a member who has some."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import grpc

from offload_core.errors import GatewayUnreachableError, OffloadError
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1 import sessions_service_pb2 as sessions_pb
from offload_proto.v1.sessions_service_pb2_grpc import SessionsServiceStub
from tests.integration.attachednode import AttachedNode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fixtures.gateway import RunningGateway

RUNNING, PAUSED = sessions_pb.SESSION_STATE_RUNNING, sessions_pb.SESSION_STATE_PAUSED
ENDED, LOST = sessions_pb.SESSION_STATE_ENDED, sessions_pb.SESSION_STATE_LOST
STARTING, STOPPING = sessions_pb.SESSION_STATE_STARTING, sessions_pb.SESSION_STATE_STOPPING
FAILED, QUEUED = sessions_pb.SESSION_STATE_FAILED, sessions_pb.SESSION_STATE_QUEUED
ROLE = identity_pb.ROLE_MEMBER
WAIT_SECONDS = 20.0


class SessionPeer(AttachedNode):
    """Keeps sessions over reconnects when `open` is handed on.

    Attributes:
        open: states of its sessions.
        used: seconds that it says of each.
        shared: members by session, as it was last told.
        work: kinds of the tasks that it got, with their sessions.
        started: the tasks that begin sessions, by session.
        silent: kinds of tasks that it does not answer.
        refusal: wire name and sentence instead of making a session.
        problem: why it takes no sessions now.
    """

    def __init__(
        self,
        gateway: RunningGateway,
        node_id: str,
        keys: Any,
        *,
        open_sessions: dict[str, int] | None = None,
        devices: Sequence[str] = (),
        **hello: Any,
    ) -> None:
        self.open: dict[str, int] = {} if open_sessions is None else open_sessions
        told = [
            nodes_pb.SessionUpdate(session_id=name, state=state)
            for name, state in self.open.items()
        ]
        defaults = {"session_slots": 2, "sessions": told}
        super().__init__(gateway, node_id, keys, **defaults | hello)
        self.devices = tuple(devices)
        self.used: dict[str, float] = {}
        self.shared: dict[str, list[str]] = {}
        self.work: list[tuple[str, str]] = []
        self.started: dict[str, nodes_pb.StartTask] = {}
        self.silent: set[str] = set()
        self.refusal: tuple[str, str] | None = None
        self.problem = ""
        self.reserved: dict[str, list[str]] = {}

    def heartbeat(self) -> nodes_pb.Heartbeat:
        """Return its state, with all that it is."""
        beat = super().heartbeat()
        beat.sessions = len(self.open)
        beat.sessions_problem = self.problem
        beat.platforms.native.append("linux/amd64")
        beat.devices.SetInParent()
        for name in self.devices:
            beat.devices.devices.add(name=name)
        beat.devices_in_sessions.extend(name for some in self.reserved.values() for name in some)
        return beat

    def did(self, kind: str) -> list[str]:
        """Return the sessions for which it got tasks of a kind."""
        return [session_id for name, session_id in self.work if name == kind]

    def take_session_task(self, task: nodes_pb.SessionTask) -> None:
        """Do what the gateway says."""
        kind, session_id = task.WhichOneof("task"), task.session_id
        self.work.append((kind, session_id))
        if kind == "start":
            self.started[session_id] = task.start
        if kind not in self.silent:
            self.do(kind, task)

    def do(self, kind: str, task: nodes_pb.SessionTask) -> None:
        """Do a task and answer it."""
        session_id = task.session_id
        reply = nodes_pb.SessionTaskReply(task_id=task.task_id)
        if kind == "start" and self.refusal is not None:
            reply.error_reason, reply.error = self.refusal
        elif kind == "start":
            self.open[session_id] = RUNNING
            self.reserved[session_id] = list(task.start.spec.devices)
            if task.start.spec.gpu:
                free = set(self.devices).difference(*self.reserved.values())
                self.reserved[session_id] = [min(free)]
            reply.started.engine_version = "29.0.0"
            reply.started.devices.extend(self.reserved[session_id])
            reply.started.limits.memory_bytes = 1 << 30
            reply.started.limits.ttl.FromSeconds(3600)
        elif kind == "stop":
            self.open.pop(session_id, None)
            self.reserved.pop(session_id, None)
        elif kind == "wake":
            self.open[session_id] = RUNNING
        else:
            self.shared[session_id] = list(task.share.members)
        self.send(session_task_reply=reply)

    def tell(self, session_id: str, state: int, used: float = 0.0, reason: str = "") -> None:
        """Tell news of a session."""
        update = nodes_pb.SessionUpdate(session_id=session_id, reason=reason)
        update.state = sessions_pb.SessionState.ValueType(state)
        update.used.FromMilliseconds(round(used * 1000))
        update.activity.running_containers = 3
        if state == ENDED:
            self.open.pop(session_id, None)
        else:
            self.open[session_id] = state
        self.send(session_update=update)


class Member:
    """What a member's command does with sessions."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub

    def start(
        self, name: str = "", *, project_id: str = "default", request_id: str = "", **spec: Any
    ) -> Any:
        """Begin a call that starts a session."""
        request = sessions_pb.StartSessionRequest(
            project_id=project_id,
            request_id=request_id or uuid.uuid4().hex,
            spec=sessions_pb.SessionSpec(name=name, **spec),
        )
        return self.stub.StartSession(request, timeout=60, metadata=call_metadata())

    async def ready(self, call: Any) -> sessions_pb.OpenSessionResponse:
        """Return where a session is that starts."""
        while not (message := await message_of(call)).HasField("ready"):
            pass
        return message.ready

    async def started(self, name: str = "", **wish: Any) -> sessions_pb.Session:
        """Start a session and return it."""
        return (await self.ready(self.start(name, **wish))).session

    async def first(self, call: Any) -> sessions_pb.StartSessionResponse:
        """Return the first message of a start."""
        return await message_of(call)

    async def call(self, method: str, request: Any) -> Any:
        """Make a call; failures are errors of ours."""
        try:
            return await getattr(self.stub, method)(
                request, timeout=WAIT_SECONDS, metadata=call_metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise domain_error(error) from error

    async def get(self, session_id: str) -> sessions_pb.Session:
        return await self.call("GetSession", sessions_pb.GetSessionRequest(session_id=session_id))

    async def open(self, session_id: str, **wish: Any) -> sessions_pb.OpenSessionResponse:
        request = sessions_pb.OpenSessionRequest(session_id=session_id, **wish)
        return await self.call("OpenSession", request)

    async def stop(self, session_id: str) -> sessions_pb.Session:
        request = sessions_pb.StopSessionRequest(session_id=session_id)
        return (await self.call("StopSession", request)).session

    async def share(self, session_id: str, **names: Any) -> sessions_pb.Session:
        request = sessions_pb.ShareSessionRequest(session_id=session_id, **names)
        return await self.call("ShareSession", request)

    async def listed(self, **query: Any) -> list[str]:
        """Return the names of the sessions in a list."""
        found = await self.call("ListSessions", sessions_pb.ListSessionsRequest(**query))
        return [session.spec.name for session in found.sessions]

    async def usage(self, project_id: str = "default") -> dict[str, sessions_pb.SessionUsage]:
        request = sessions_pb.GetSessionUsageRequest(project_id=project_id)
        found = await self.call("GetSessionUsage", request)
        return {item.member: item for item in found.members}

    async def until(self, session_id: str, state: int) -> sessions_pb.Session:
        """Wait for a state."""
        async with asyncio.timeout(WAIT_SECONDS):
            while (session := await self.get(session_id)).state != state:
                await asyncio.sleep(0.02)
        return session


def domain_error(error: grpc.RpcError) -> OffloadError:
    """Return the error of ours behind one of gRPC."""
    return error_from_rpc(error, peer="the gateway", unreachable=GatewayUnreachableError)


async def message_of(call: Any) -> Any:
    """Return the next message of a call; failures are errors of ours."""
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise domain_error(error) from error
    assert message is not grpc.aio.EOF, "the call ended before the session was ready"
    return message


async def member_of(gateway: RunningGateway, token: str = "") -> Member:
    """Return a member with a token, the administrator by default."""
    return Member(SessionsServiceStub(await gateway.channel(await gateway.login(token))))


async def peer_of(gateway: RunningGateway, node_id: str = "n1", **options: Any) -> SessionPeer:
    """Return a node that is enrolled."""
    return SessionPeer(gateway, node_id, await gateway.enroll_node(node_id), **options)


async def people(gateway: RunningGateway, *names: str, role: Any = ROLE) -> list[Any]:
    return [await member_of(gateway, await gateway.create_token(name, role)) for name in names]

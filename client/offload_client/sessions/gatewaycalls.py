"""The gateway's calls about sessions, as commands need them."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

import grpc

from offload_client.gateway import GatewayCalls
from offload_core.aio import finish
from offload_core.errors import GatewayUnreachableError, NotFoundError, OffloadError, UsageError
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1.identity_service_pb2 import WhoAmIRequest
from offload_proto.v1.sessions_service_pb2 import (
    GetSessionRequest,
    GetSessionUsageRequest,
    ListSessionsRequest,
    OpenSessionRequest,
    SessionState,
    ShareSessionRequest,
    StartSessionRequest,
    StopSessionRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings
    from offload_proto.v1.identity_service_pb2 import WhoAmIResponse
    from offload_proto.v1.sessions_service_pb2 import (
        OpenSessionResponse,
        Session,
        SessionQueued,
        SessionSpec,
        SessionStarting,
        SessionUsage,
    )

STOP_SECONDS = 90.0
"""A node takes a while for the disk of a large session."""
WAKE_SECONDS = 45.0
LEAVE_SECONDS = 3.0
COME_BACK_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""A gateway that restarts while somebody waits finds the session again by its request."""
MAX_LISTED = 500
_CLOSED = frozenset(
    (
        SessionState.SESSION_STATE_ENDED,
        SessionState.SESSION_STATE_LOST,
        SessionState.SESSION_STATE_FAILED,
    )
)


def is_open(session: Session) -> bool:
    """Return whether a session can still be used."""
    return session.state not in _CLOSED


class SessionCalls:
    """What commands ask the gateway about sessions."""

    def __init__(self, calls: GatewayCalls) -> None:
        self.calls = calls
        self._stub = calls.sessions()

    @classmethod
    async def open_for(
        cls, invocation: Invocation, settings: Settings, connections: Connections
    ) -> SessionCalls:
        """Return the calls for the gateway of a command.

        Raises:
            AuthenticationError: not logged in.
        """
        return cls(await GatewayCalls.open(invocation, settings, connections))

    async def who(self) -> WhoAmIResponse:
        """Return who the caller is."""
        reply: WhoAmIResponse = await self.calls.call(self.calls.identity.WhoAmI, WhoAmIRequest())
        return reply

    async def start(
        self,
        project: str,
        spec: SessionSpec,
        *,
        on_queued: Callable[[SessionQueued], None],
        on_starting: Callable[[SessionStarting], None],
    ) -> OpenSessionResponse:
        """Wait until a session is ready; cancelling this ends it and leaves nothing.

        Raises:
            OffloadError: the gateway refuses, no node can, or the gateway is away for too long.
        """
        request = StartSessionRequest(
            project_id=project, spec=spec, request_id=secrets.token_hex(16)
        )
        seen: list[str] = []

        def queued(message: SessionQueued) -> None:
            seen[:] = [message.session_id]
            on_queued(message)

        def starting(message: SessionStarting) -> None:
            seen[:] = [message.session_id]
            on_starting(message)

        pauses = iter(COME_BACK_SECONDS)
        try:
            while True:
                try:
                    return await self._follow_start(request, queued, starting)
                except GatewayUnreachableError:
                    pause = next(pauses, None)
                    if not seen or pause is None:
                        raise
                await asyncio.sleep(pause)
        except (asyncio.CancelledError, OffloadError):
            if seen:
                await finish(self._give_up(seen[0]), LEAVE_SECONDS)
            raise

    async def _follow_start(
        self,
        request: StartSessionRequest,
        on_queued: Callable[[SessionQueued], None],
        on_starting: Callable[[SessionStarting], None],
    ) -> OpenSessionResponse:
        call = self._stub.StartSession(request, metadata=call_metadata())
        try:
            async for message in call:
                kind = message.WhichOneof("state")
                if kind == "ready":
                    return message.ready
                if kind == "queued":
                    on_queued(message.queued)
                elif kind == "starting":
                    on_starting(message.starting)
        except grpc.RpcError as error:
            raise error_from_rpc(
                error,  # type: ignore[arg-type]
                peer=f"the gateway at {self.calls.address}",
                unreachable=GatewayUnreachableError,
            ) from error
        finally:
            call.cancel()
        raise GatewayUnreachableError(
            f"the gateway at {self.calls.address} ended the call without a session"
        )

    async def _give_up(self, session_id: str) -> None:
        try:
            await self.stop(session_id, timeout=LEAVE_SECONDS)
        except OffloadError:
            # It ends by itself too, as its client has gone away.
            return

    async def open(self, session_id: str, *, keep_paused: bool = False) -> OpenSessionResponse:
        """Return where a session is, which wakes it unless it is to stay paused."""
        request = OpenSessionRequest(session_id=session_id, keep_paused=keep_paused)
        reply: OpenSessionResponse = await self.calls.call(
            self._stub.OpenSession, request, timeout=WAKE_SECONDS
        )
        return reply

    async def get(self, session_id: str) -> Session:
        """Return one session, ended ones too."""
        request = GetSessionRequest(session_id=session_id)
        reply: Session = await self.calls.call(self._stub.GetSession, request)
        return reply

    async def listed(self, *, project: str = "", ended: bool = False) -> Sequence[Session]:
        """Return the sessions that the caller may see, newest first."""
        request = ListSessionsRequest(project_id=project, ended=ended, limit=MAX_LISTED)
        sessions: Sequence[Session] = (
            await self.calls.call(self._stub.ListSessions, request)
        ).sessions
        return sessions

    async def stop(self, session_id: str, *, timeout: float = STOP_SECONDS) -> Session:
        """End a session; return it as it ended."""
        request = StopSessionRequest(session_id=session_id)
        reply = await self.calls.call(self._stub.StopSession, request, timeout=timeout)
        session: Session = reply.session
        return session

    async def share(
        self, session_id: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()
    ) -> Session:
        """Say who else may use a session; return it."""
        request = ShareSessionRequest(session_id=session_id, add=add, remove=remove)
        reply: Session = await self.calls.call(self._stub.ShareSession, request)
        return reply

    async def usage(self, project: str, since: float | None) -> Sequence[SessionUsage]:
        """Return what the members of a project used.

        Args:
            project: of the sessions.
            since: seconds since 1970; None for what the gateway takes.
        """
        request = GetSessionUsageRequest(project_id=project)
        if since is not None:
            request.since.FromMilliseconds(round(since * 1000))
        members: Sequence[SessionUsage] = (
            await self.calls.call(self._stub.GetSessionUsage, request)
        ).members
        return members

    async def find(self, text: str, member: str) -> Session:
        """Return the open session that a person means.

        Args:
            text: its id, the beginning of it, or its name.
            member: whose sessions come first when a name is of several.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several.
        """
        sessions = await self.listed()
        return choose([session for session in sessions if is_open(session)], text, member)


def choose(sessions: Sequence[Session], text: str, member: str) -> Session:
    """Return the session that is meant by an id, the beginning of one, or a name.

    Raises:
        NotFoundError: there is none.
        UsageError: there are several.
    """
    for found in (
        [session for session in sessions if session.session_id == text],
        [s for s in sessions if s.spec.name == text and s.owner == member],
        [session for session in sessions if session.spec.name == text],
        [session for session in sessions if text and session.session_id.startswith(text)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(f"{session.session_id} of {session.owner}" for session in found)
            raise UsageError(f'"{text}" may mean several sessions: {ids}; give an id')
    raise NotFoundError(
        f'there is no session "{text}" that you may use', hint="list them with: offload ps"
    )

"""SessionsService: docker engines of members' own."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.cachetrust import CacheMember, CacheTrust
from offload_builder.gateway.nodetasks import ask_session
from offload_builder.gateway.sessions.messages import session_message
from offload_builder.gateway.sessions.queue import Ready, Starting
from offload_builder.gateway.sessions.sharing import shared_with
from offload_builder.gateway.sessions.table import (
    MAX_LIST,
    PAUSED,
    RUNNING,
    SessionQuery,
    SessionRecord,
    SessionTotal,
    state_name,
)
from offload_builder.gateway.sessions.usage import sum_up
from offload_builder.gateway.tickets import CacheWish, cache_scopes
from offload_core.errors import (
    AccessDeniedError,
    NodeLostError,
    NotFoundError,
    OffloadError,
    UsageError,
)
from offload_core.tls import NODE_SUFFIX
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1 import sessions_service_pb2 as sessions_pb
from offload_proto.v1.sessions_service_pb2_grpc import SessionsServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpc import aio

    from offload_builder.gateway.access import Access, Caller
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.sessions.active import ActiveSession
    from offload_builder.gateway.sessions.sessions import Sessions
    from offload_builder.gateway.tokens import TokenRecord

log = structlog.get_logger(__name__)

WAKE_SECONDS = 60.0
"""How long a node may take to wake a session."""
SHARE_SECONDS = 10.0
USAGE_DAYS = 30
DEFAULT_LIST = 100
START_HINT = "start a new one with: offload start"

_RECHECK_SECONDS = 5.0
"""A caller that waited longer is looked up again before it is told where its session is."""


class SessionsService(SessionsServiceServicer):
    """Unpacks, authorises, calls, packs."""

    def __init__(
        self,
        config: GatewayConfig,
        access: Access,
        members: Members,
        nodes: NodeRegistry,
        sessions: Sessions,
        endpoints: Callable[[AttachedNode], list[str]],
    ) -> None:
        self._trust = CacheTrust(config.default_branches, config.protected_branches)
        self._config = config
        self._access = access
        self._members = members
        self._nodes = nodes
        self._sessions = sessions
        self._endpoints = endpoints

    async def StartSession(  # noqa: N802
        self,
        request: sessions_pb.StartSessionRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[sessions_pb.StartSessionResponse]:
        """Queue a session, and follow it until it is ready."""
        caller = await self._access.member(context)
        token = caller.token
        if not request.project_id:
            raise UsageError("a session needs a project; set it with --project or in offload.toml")
        token.check_project(request.project_id)
        await self._members.project(request.project_id, visible_to=token)
        self._check_role(token, request.spec)
        domain = cache_scopes(
            request.project_id, CacheMember.behind(token), CacheWish(), self._trust
        ).trust_domain
        session = await self._sessions.queue.submit(request, token, domain)
        session_id = session.session_id
        started = asyncio.get_running_loop().time()
        async with aclosing(self._sessions.queue.updates(session)) as updates:
            async for update in updates:
                if isinstance(update, Ready):
                    if asyncio.get_running_loop().time() - started > _RECHECK_SECONDS:
                        await self._still_allowed(session, context)
                    yield sessions_pb.StartSessionResponse(ready=self._opened(session))
                elif isinstance(update, Starting):
                    starting = sessions_pb.SessionStarting(
                        session_id=session_id, node_id=update.node_id
                    )
                    yield sessions_pb.StartSessionResponse(starting=starting)
                else:
                    queued = sessions_pb.SessionQueued(
                        session_id=session_id, position=update.position, reason=update.reason
                    )
                    yield sessions_pb.StartSessionResponse(queued=queued)

    def _check_role(self, token: TokenRecord, spec: sessions_pb.SessionSpec) -> None:
        if token.role != identity_pb.ROLE_UNTRUSTED:
            return
        if not self._config.sessions_untrusted:
            raise AccessDeniedError(
                "an untrusted member may not start sessions",
                hint="an administrator can allow it with sessions_untrusted of the gateway",
            )
        if spec.gpu or spec.devices:
            raise AccessDeniedError("an untrusted member's session can have no devices")

    async def _still_allowed(
        self, session: ActiveSession, context: aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            caller = await self._access.member(context)
            caller.token.check_project(session.record.project_id)
        except OffloadError as error:
            self._sessions.ending.stop_soon(session, error.message)
            raise

    async def OpenSession(  # noqa: N802
        self, request: sessions_pb.OpenSessionRequest, context: aio.ServicerContext[Any, Any]
    ) -> sessions_pb.OpenSessionResponse:
        """Say where a session is, and wake it."""
        caller = await self._access.member(context)
        record = await self._visible(request.session_id, caller.token)
        if not record.may_use(caller.token.name):
            raise AccessDeniedError(
                f'the session "{record.name}" is that of "{record.owner}", who has not shared it '
                "with you",
                hint=f"its owner can: offload share {record.name} NAME",
            )
        session = self._sessions.active.find(record.session_id)
        if session is None:
            raise NotFoundError(
                f'the session "{record.name}" has ended: '
                f"{record.reason or state_name(record.state)}",
                hint=START_HINT,
            )
        if not session.ready:
            raise UsageError(
                f'the session "{record.name}" is {state_name(record.state)}, and cannot be used'
                f"{' yet' if not record.ready_at else ''}"
            )
        if record.state == PAUSED and not request.keep_paused:
            await self._wake(session)
        return self._opened(session)

    async def _wake(self, session: ActiveSession) -> None:
        node = self._node_of(session.record)
        task = nodes_pb.SessionTask(session_id=session.session_id)
        task.wake.SetInParent()
        await ask_session(node, task, WAKE_SECONDS)
        if session.record.state == PAUSED:
            # The node's own news may come a moment later.
            self._sessions.active.change(session, state=RUNNING, reason="")

    def _opened(self, session: ActiveSession) -> sessions_pb.OpenSessionResponse:
        node = self._node_of(session.record)
        return sessions_pb.OpenSessionResponse(
            session=self._message(session.record),
            endpoints=self._endpoints(node),
            server_name=node.node_id + NODE_SUFFIX,
        )

    def _node_of(self, record: SessionRecord) -> AttachedNode:
        node = self._nodes.find(record.node_id)
        if node is None or node.connection is None:
            raise NodeLostError(
                f'node {record.node_id} of the session "{record.name}" is away for the moment',
                hint="try again in a moment; what runs in the session goes on",
            )
        return node

    async def GetSession(  # noqa: N802
        self, request: sessions_pb.GetSessionRequest, context: aio.ServicerContext[Any, Any]
    ) -> sessions_pb.Session:
        """Return one session."""
        caller = await self._access.member(context)
        return self._message(await self._visible(request.session_id, caller.token))

    async def ListSessions(  # noqa: N802
        self, request: sessions_pb.ListSessionsRequest, context: aio.ServicerContext[Any, Any]
    ) -> sessions_pb.ListSessionsResponse:
        """Return sessions, newest first."""
        caller = await self._access.member(context)
        if not 0 <= request.limit <= MAX_LIST:
            raise UsageError(f"limit must be between 0 and {MAX_LIST}")
        projects = caller.visible_projects()
        if request.project_id:
            caller.token.check_project(request.project_id)
            await self._members.project(request.project_id, visible_to=caller.token)
            projects = (request.project_id,)
        query = SessionQuery(
            project_ids=projects,
            member="" if caller.token.is_admin else caller.token.name,
            open_only=not request.ended,
            limit=request.limit or DEFAULT_LIST,
        )
        records = await self._sessions.table.page(query)
        return sessions_pb.ListSessionsResponse(
            sessions=[self._message(self._sessions.newest(record)) for record in records]
        )

    async def StopSession(  # noqa: N802
        self, request: sessions_pb.StopSessionRequest, context: aio.ServicerContext[Any, Any]
    ) -> sessions_pb.StopSessionResponse:
        """End a session; one that has ended already stays as it is."""
        caller = await self._access.member(context)
        record = await self._visible(request.session_id, caller.token)
        _check_owner(record, caller, "end it", admin=True)
        session = self._sessions.active.find(record.session_id)
        if session is not None:
            await self._sessions.ending.stop(session, f"stopped by {caller.token.name}")
            record = session.record
        return sessions_pb.StopSessionResponse(session=self._message(record))

    async def ShareSession(  # noqa: N802
        self, request: sessions_pb.ShareSessionRequest, context: aio.ServicerContext[Any, Any]
    ) -> sessions_pb.Session:
        """Say who else may use a session; its node hears of it before the answer."""
        caller = await self._access.member(context)
        record = await self._visible(request.session_id, caller.token)
        _check_owner(record, caller, "share it", admin=False)
        session = self._sessions.active.find(record.session_id)
        if session is None or not session.ready:
            raise UsageError(
                f'the session "{record.name}" is {state_name(record.state)}, and cannot be shared'
            )
        names = await shared_with(self._members, session.record, request)
        self._sessions.active.change(session, shared_with=names)
        node = self._node_of(session.record)
        task = nodes_pb.SessionTask(session_id=session.session_id)
        task.share.members.extend(names)
        await ask_session(node, task, SHARE_SECONDS)
        return self._message(session.record)

    async def GetSessionUsage(  # noqa: N802
        self, request: sessions_pb.GetSessionUsageRequest, context: aio.ServicerContext[Any, Any]
    ) -> sessions_pb.GetSessionUsageResponse:
        """Sum up the sessions of a project."""
        caller = await self._access.member(context)
        caller.token.check_project(request.project_id)
        await self._members.project(request.project_id, visible_to=caller.token)
        since = datetime.now(UTC) - timedelta(days=USAGE_DAYS)
        if request.HasField("since"):
            try:
                since = request.since.ToDatetime(tzinfo=UTC)
            except (ValueError, OverflowError) as error:
                raise UsageError("since is not a valid time") from error
        owner = "" if caller.token.is_admin else caller.token.name
        totals, still = await self._sessions.table.used_since(request.project_id, since, owner)
        for record in map(self._sessions.newest, still):
            used = self._sessions.used_milliseconds(record)
            totals.append(SessionTotal.of(record, used))
        usages = sum_up(totals, self._config.cost_currency)
        return sessions_pb.GetSessionUsageResponse(members=[item.message() for item in usages])

    async def _visible(self, session_id: str, token: TokenRecord) -> SessionRecord:
        """Return a session that a caller may know of.

        Raises:
            NotFoundError: there is none, or it is none of the caller's business.
        """
        record = await self._sessions.find(session_id)
        if record is not None and (
            token.is_admin or (record.may_use(token.name) and token.may_use(record.project_id))
        ):
            return record
        raise NotFoundError(
            f"there is no session {session_id[:40]!a}", hint="list sessions with: offload ps --all"
        )

    def _message(self, record: SessionRecord) -> sessions_pb.Session:
        return session_message(record, self._sessions.used_milliseconds(record))


def _check_owner(record: SessionRecord, caller: Caller, action: str, *, admin: bool) -> None:
    if record.owner == caller.token.name or (admin and caller.token.is_admin):
        return
    raise AccessDeniedError(
        f'the session "{record.name}" is that of "{record.owner}"; only '
        f"{'its owner and administrators' if admin else 'its owner'} may {action}"
    )

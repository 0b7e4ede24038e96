"""Sessions wait here for a node, and are made at one."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.sessions.making import SessionMaker, last_failure
from offload_builder.gateway.sessions.nodeview import node_view, wish_of
from offload_builder.gateway.sessions.placement import candidates, refusal, waiting_reason
from offload_builder.gateway.sessions.requests import check_bounds, checked_record
from offload_builder.gateway.sessions.table import (
    ENDED,
    FAILED,
    LOST,
    QUEUED,
    STARTING,
    STOPPING,
)
from offload_core.errors import (
    AccessDeniedError,
    BuildCanceledError,
    GatewayUnreachableError,
    InternalError,
    QueueTimeoutError,
    UsageError,
)
from offload_core.units import format_duration

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.platforms import PoolPlatforms
    from offload_builder.gateway.sessions.active import ActiveSession, ActiveSessions
    from offload_builder.gateway.sessions.cost import Rates
    from offload_builder.gateway.sessions.placement import SessionNode
    from offload_builder.gateway.sessions.table import SessionRecord
    from offload_builder.gateway.tokens import TokenRecord
    from offload_core.errors import OffloadError
    from offload_proto.v1 import sessions_service_pb2 as sessions_pb

log = structlog.get_logger(__name__)

QUEUE_HINT = "try again later, or ask the administrator for more nodes"


@dataclass(frozen=True)
class Waiting:
    """The session has a place in the queue."""

    position: int
    reason: str


@dataclass(frozen=True)
class Starting:
    """A node makes the session."""

    node_id: str


@dataclass(frozen=True)
class Ready:
    """The session can be used."""


class SessionQueue:
    """The queue. Belongs to the event loop; `run` must run for anything to move.

    Args:
        config: of the gateway.
        sessions: that have not ended.
        nodes: of the pool.
        platforms: knows when nodes have had their time to attach.
        rates: what sessions cost that begin now.
        on_left: ends a session that a node has made, or makes, for a client that is gone.
    """

    def __init__(
        self,
        config: GatewayConfig,
        sessions: ActiveSessions,
        nodes: NodeRegistry,
        platforms: PoolPlatforms,
        rates: Rates,
        on_left: Callable[[ActiveSession, str], None],
    ) -> None:
        self._config = config
        self._sessions = sessions
        self._nodes = nodes
        self._platforms = platforms
        self._on_left = on_left
        self._wake = asyncio.Event()
        self._stopping = False
        self._maker = SessionMaker(config.session_start_timeout, sessions, rates, self)

    def wake(self) -> None:
        """Look at the queue again soon."""
        self._wake.set()

    async def submit(
        self, request: sessions_pb.StartSessionRequest, token: TokenRecord, trust_domain: str
    ) -> ActiveSession:
        """Put a session into the queue, or find the one that the same request has made before.

        Args:
            request: the session.
            token: of who asks.
            trust_domain: of the owner's builds.

        Raises:
            UsageError: the request cannot be understood, its name is taken or its session ended.
            QuotaExceededError: a bound of sessions is reached.
            NotFoundError: no node of the pool can do what it wants.
            GatewayUnreachableError: the gateway is stopping.
        """
        self.check_open()
        record = checked_record(request, token, trust_domain)
        known = self._sessions.find_request(token.token_id, record.request_id)
        if known is not None:
            if known.record.project_id != record.project_id:
                raise AccessDeniedError(
                    "this request_id already belongs to a session of the project "
                    f"{known.record.project_id}"
                )
            return known
        check_bounds(self._config, self._sessions, record)
        if problem := self._refusal(record):
            raise problem
        # In memory first: the same request may come a second time while this one is written.
        session = self._sessions.add(record)
        try:
            written = await self._sessions.table.insert(record)
        except BaseException:
            text = "the session could not be written down"
            self._sessions.forget(session, InternalError(text))
            # It may be written nevertheless, for a caller that has gone.
            values = {"state": FAILED, "reason": text, "ended_at": datetime.now(UTC)}
            self._sessions.table.change(record.session_id, **values)
            raise
        if not written:
            before = await self._sessions.table.find_request(token.token_id, record.request_id)
            which = f"session {before.session_id}" if before is not None else "another session"
            error = UsageError(
                f"this request has already made {which}, which has ended; use a new request_id"
            )
            self._sessions.forget(session, error)
            raise error
        session.written = True
        session.queue_limit.start(self._config.queue_timeout, self._waited_too_long, session)
        log.info(
            "session.admitted",
            session_id=record.session_id,
            project_id=record.project_id,
            member=record.owner,
        )
        return session

    def readmit(self, session: ActiveSession) -> None:
        """Let a session that waited before a restart wait for its client, in its old place."""
        session.written = True
        age = (datetime.now(UTC) - session.record.created_at).total_seconds()
        left = max(1.0, self._config.queue_timeout - age)
        session.queue_limit.start(left, self._waited_too_long, session)
        session.grace.start(self._config.restart_grace, self._restart_is_over, session)

    def requeue(self, session: ActiveSession) -> None:
        """Let a session wait again whose node has not made it."""
        session.picked = ()
        self._sessions.change(session, state=QUEUED, node_id="")
        self.wake()

    async def updates(self, session: ActiveSession) -> AsyncGenerator[Waiting | Starting | Ready]:
        """Report how a session comes to be until it is ready.

        While nobody listens no node is asked; some time later it ends.

        Raises:
            OffloadError: it does not become ready.
        """
        async with self._watched(session):
            last: Waiting | Starting | None = None
            while True:
                if session.outcome is not None:
                    raise session.outcome
                if session.ready:
                    session.delivered = True
                    yield Ready()
                    return
                if not session.record.open or session.record.state == STOPPING:
                    raise BuildCanceledError(
                        f'the session "{session.record.name}" was ended: '
                        f"{session.record.stop_reason or session.record.reason}"
                    )
                self.check_open()
                view = _view(session)
                if view is not None and view != last:
                    last = view
                    yield view
                    # The state may have changed while the message was sent.
                    continue
                await session.changed.wait()

    @asynccontextmanager
    async def _watched(self, session: ActiveSession) -> AsyncIterator[None]:
        session.watchers += 1
        if session.queued or session.making:
            session.grace.stop()
            self.wake()
        try:
            yield
        finally:
            session.watchers -= 1
            # One whose node was asked before a restart is looked at when the node is back.
            follows = session.queued or session.making or session.ready
            unseen = follows and not session.delivered
            if unseen and not session.watchers and not self._stopping:
                session.position = 0
                session.grace.start(self._config.client_grace, self._client_is_gone, session)
                self.wake()

    def check_open(self) -> None:
        """Refuse work while the gateway stops.

        Raises:
            GatewayUnreachableError: it does.
        """
        if self._stopping:
            raise GatewayUnreachableError(
                "this gateway is stopping; try again in a moment, sessions go on meanwhile"
            )

    async def run(self) -> None:
        """Hand out sessions until cancelled."""
        loop = asyncio.get_running_loop()
        # What the pool cannot do is known when its nodes have had their time to attach.
        look = loop.call_later(self._config.restart_grace + 0.05, self.wake)
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._dispatch()
        finally:
            look.cancel()
            await self._maker.close()

    def stop(self) -> None:
        """Hand out nothing more and end all waiting."""
        self._stopping = True
        for session in self._sessions.all():
            session.changed.fire()

    def _dispatch(self) -> None:
        """Ask nodes, then tell everyone in the queue the new places.

        A session that no node can take now does not hold back the ones behind it.
        """
        if self._stopping:
            return
        position = 0
        for session in sorted(self._sessions.all(), key=lambda item: item.arrival):
            if not (session.queued and session.watchers and session.written):
                continue
            if session.record.stop_reason or self._give_up(session):
                continue
            views = self._views()
            wish = wish_of(session.record, {*session.failed, *session.busy})
            found = candidates(wish, views)
            node = self._nodes.find(found[0]) if found else None
            if node is not None:
                view = next(view for view in views if view.node_id == node.node_id)
                self._maker.make(session, node, view.pick(wish) or ())
                continue
            position += 1
            reason = waiting_reason(wish, views)
            if (session.position, session.waits_for) != (position, reason):
                session.position, session.waits_for = position, reason
                session.changed.fire()

    def _views(self) -> list[SessionNode]:
        return [self._node_view(node) for node in self._nodes.connected()]

    def _node_view(self, node: AttachedNode) -> SessionNode:
        return node_view(node, self._sessions.at_node(node.node_id))

    def _refusal(self, record: SessionRecord) -> OffloadError | None:
        nodes = self._platforms.serving(record.project_id)
        if not nodes or not self._platforms.settled(nodes):
            # Without any node a session waits: the pool may be about to start one.
            return None
        return refusal(wish_of(record), [self._node_view(node) for node in nodes])

    def _give_up(self, session: ActiveSession) -> bool:
        """End a session that no node will make."""
        record = session.record
        problem = self._refusal(record)
        if problem is None and session.failed:
            wish = wish_of(record)
            left = [view for view in self._views() if view.suits(wish)]
            if all(view.node_id in session.failed for view in left):
                problem = last_failure(session)
        if problem is None:
            return False
        self._sessions.end(session, FAILED, problem.message, problem)
        return True

    def _waited_too_long(self, session: ActiveSession) -> None:
        if not session.queued:
            return
        text = f"no node became free within {format_duration(self._config.queue_timeout)}"
        if session.waits_for:
            text += f": {session.waits_for}"
        error = QueueTimeoutError(text, hint=QUEUE_HINT)
        self._sessions.end(session, FAILED, text, error)

    def _client_is_gone(self, session: ActiveSession) -> None:
        text = "its client left before it was ready"
        if session.queued:
            error = BuildCanceledError(f'the session "{session.record.name}" was ended: {text}')
            self._sessions.end(session, ENDED, text, error)
        elif session.record.open and not session.delivered:
            self._on_left(session, text)

    def _restart_is_over(self, session: ActiveSession) -> None:
        if session.queued and not session.watchers:
            text = "the gateway restarted while it waited, and its client did not come back"
            self._sessions.end(session, LOST, text)


def _view(session: ActiveSession) -> Waiting | Starting | None:
    if session.record.state == STARTING:
        return Starting(session.record.node_id)
    if session.queued and session.position and session.waits_for:
        return Waiting(session.position, session.waits_for)
    return None

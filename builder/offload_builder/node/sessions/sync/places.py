"""Which session a call for a synchronised directory is about, and what it may use there."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from offload_builder.node.sessions.service import called_session
from offload_builder.node.sessions.sync.desk import SyncPlace
from offload_core.errors import NodeLostError
from offload_proto.v1.sessions_service_pb2 import SessionState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from offload_builder.node.contextstore import ContextStore
    from offload_builder.node.sessions.calls import SessionCall
    from offload_builder.node.sessions.nodesessions import NodeSessions


class SyncPlaces:
    """Finds the places of calls.

    Args:
        sessions: of the node.
        store: returns the context files of a project that somebody of a trust domain may use;
            None for none.
    """

    def __init__(
        self,
        sessions: NodeSessions,
        store: Callable[[str, str], Awaitable[ContextStore | None]],
    ) -> None:
        self._sessions = sessions
        self._store = store

    @asynccontextmanager
    async def open(self, context: Any) -> AsyncIterator[tuple[SyncPlace, SessionCall]]:
        """Give the place of a call while the context is open; that is no use of the session.

        Raises:
            NotFoundError: there is no such session, or it is not theirs.
            NodeLostError: it is paused, or has not begun.
            QuotaExceededError: the member has too many calls.
        """
        session, member = called_session(self._sessions, context)
        with session.calls.open(member, counts=False) as call:
            store = await self._store(session.place.project_id, session.place.trust_domain)
            if session.state != SessionState.SESSION_STATE_RUNNING or session.engine is None:
                raise NodeLostError("the session is paused, or has not begun")
            yield SyncPlace(session.session_id, session.engine.pid, store), call

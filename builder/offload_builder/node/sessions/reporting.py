"""News of sessions for the gateway: every change of state at once, everything else together."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from offload_builder.node.sessions.session import NodeSession
    from offload_proto.v1.nodes_service_pb2 import SessionUpdate
    from offload_proto.v1.sessions_service_pb2 import SessionState

SOON_SECONDS = 1.0
"""What changes about a session that stays in its state is told together."""
ENDED_KEPT_SECONDS = 600.0
ENDED_KEPT = 1000
"""Ends are told again after a reconnect, for so long and of so many sessions."""


class SessionReports(Protocol):
    """The way to the gateway."""

    def report_session(self, update: SessionUpdate) -> None:
        """Send an update as soon as there is a connection; the last one of each session counts."""


class Reporting:
    """Of all sessions of a node; belongs to the event loop."""

    def __init__(self, reports: SessionReports) -> None:
        """Report over `reports`."""
        self._reports = reports
        self._told: dict[str, tuple[SessionState.ValueType, float]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ended: dict[str, tuple[float, SessionUpdate]] = {}

    def changed(self, session: NodeSession) -> None:
        """Hear that something about a session is new."""
        loop = asyncio.get_running_loop()
        state, at = self._told.get(session.session_id, (None, 0.0))
        if state != session.state or loop.time() - at >= SOON_SECONDS:
            self.tell(session)
        elif session.session_id not in self._timers:
            again = partial(self.tell, session)
            self._timers[session.session_id] = loop.call_later(SOON_SECONDS, again)

    def tell(self, session: NodeSession) -> None:
        """Tell of a session now, unless it is over."""
        if (timer := self._timers.pop(session.session_id, None)) is not None:
            timer.cancel()
        if not session.over.is_set():
            now = asyncio.get_running_loop().time()
            self._told[session.session_id] = (session.state, now)
            self._reports.report_session(session.update())

    def over(self, update: SessionUpdate) -> None:
        """Tell how a session ended, and remember it for a while."""
        self._told.pop(update.session_id, None)
        if (timer := self._timers.pop(update.session_id, None)) is not None:
            timer.cancel()
        self._ended[update.session_id] = (asyncio.get_running_loop().time(), update)
        while len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]
        self._reports.report_session(update)

    def ended(self) -> list[SessionUpdate]:
        """Return how sessions ended lately."""
        limit = asyncio.get_running_loop().time() - ENDED_KEPT_SECONDS
        self._ended = {key: value for key, value in self._ended.items() if value[0] > limit}
        return [update for _, update in self._ended.values()]

    def close(self) -> None:
        """Tell nothing later."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

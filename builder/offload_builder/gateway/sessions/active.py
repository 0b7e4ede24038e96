"""Sessions that have not ended, in memory, and every change of their state.

All of it belongs to the event loop. Changes are written to the table in their order.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.pulse import Pulse
from offload_builder.gateway.sessions.table import (
    OPEN_STATES,
    PAUSED,
    QUEUED,
    RUNNING,
    SessionRecord,
    state_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.gateway.sessions.table import SessionsTable
    from offload_core.errors import OffloadError
    from offload_proto.v1 import sessions_service_pb2 as sessions_pb

log = structlog.get_logger(__name__)

WRITE_SECONDS = 10.0
"""How often at most the time and the activity of a session are written without other news."""


class Timer:
    """Calls something later, unless something happens before; one call at a time."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` after a time instead of what was to be called."""
        self.stop()
        self._handle = asyncio.get_running_loop().call_later(seconds, action, *arguments)

    def stop(self) -> None:
        """Call nothing."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


@dataclass
class ActiveSession:
    """One session that has not ended, or has just ended."""

    record: SessionRecord
    arrival: int
    position: int = 0
    """1 is the next to get a node; 0 as long as it has no place in the queue."""
    waits_for: str = ""
    """Why it waits, in one sentence."""
    written: bool = False
    """The table has it; before that no node is asked."""
    making: bool = False
    """This process waits for a node that makes it."""
    delivered: bool = False
    """Its client was told where it is."""
    watchers: int = 0
    outcome: OffloadError | None = None
    """Why it never became ready."""
    failed: dict[str, OffloadError] = field(default_factory=dict)
    """What nodes answered that could not make it."""
    busy: set[str] = field(default_factory=set)
    """Nodes that had no room, and are not asked again for a moment."""
    picked: tuple[str, ...] = ()
    """Devices that count as taken until its node says what it has got."""
    told_at: float = 0.0
    """Loop time when its node said how much time counts."""
    written_at: float = 0.0
    changed: Pulse = field(default_factory=Pulse)
    queue_limit: Timer = field(default_factory=Timer)
    grace: Timer = field(default_factory=Timer)

    @property
    def session_id(self) -> str:
        """Identifier."""
        return self.record.session_id

    @property
    def queued(self) -> bool:
        """Whether it waits for a node."""
        return self.record.state == QUEUED

    @property
    def ready(self) -> bool:
        """Whether clients can go to it."""
        return self.record.state in (RUNNING, PAUSED)

    def used_milliseconds(self) -> int:
        """Return the time that counts, with what has passed since its node said so."""
        used = self.record.used_milliseconds
        if self.record.state == RUNNING and self.told_at:
            used += round((asyncio.get_running_loop().time() - self.told_at) * 1000)
        return used

    def devices_at_node(self) -> tuple[str, ...]:
        """Return the devices that it has for itself, as far as is known."""
        return self.record.devices or self.picked

    def stop_timers(self) -> None:
        """Take back all that would happen later."""
        self.queue_limit.stop()
        self.grace.stop()


class ActiveSessions:
    """The sessions that have not ended, by id."""

    def __init__(self, table: SessionsTable) -> None:
        self.table = table
        self._sessions: dict[str, ActiveSession] = {}
        self._by_request: dict[tuple[str, str], ActiveSession] = {}
        self._arrivals = 0
        self._on_change: Callable[[], None] = _nothing

    def listen(self, on_change: Callable[[], None]) -> None:
        """Set what is called when there may be room for another session."""
        self._on_change = on_change

    def add(self, record: SessionRecord) -> ActiveSession:
        """Take a session in, in the state of its record."""
        self._arrivals += 1
        session = ActiveSession(record, self._arrivals)
        self._sessions[record.session_id] = session
        self._by_request[record.token_id, record.request_id] = session
        return session

    def forget(self, session: ActiveSession, outcome: OffloadError) -> None:
        """Take out a session that never came to be, and tell those who wait for it why."""
        session.stop_timers()
        session.outcome = outcome
        self._remove(session)
        session.changed.fire()

    def find(self, session_id: str) -> ActiveSession | None:
        """Return a session that has not ended, or None."""
        return self._sessions.get(session_id)

    def find_request(self, token_id: str, request_id: str) -> ActiveSession | None:
        """Return the session that a request has made and that has not ended, or None."""
        return self._by_request.get((token_id, request_id))

    def find_name(self, project_id: str, owner: str, name: str) -> ActiveSession | None:
        """Return the open session that an owner calls so in a project, or None."""
        for session in self._sessions.values():
            record = session.record
            if (record.project_id, record.owner, record.name) == (project_id, owner, name):
                return session
        return None

    def all(self) -> list[ActiveSession]:
        """Return all, oldest first."""
        return list(self._sessions.values())

    def at_node(self, node_id: str) -> list[ActiveSession]:
        """Return the sessions that are at a node, or being made there."""
        return [session for session in self._sessions.values() if session.record.node_id == node_id]

    def places(self) -> dict[tuple[str, str], str]:
        """Return the node of the session that a member started last, by project and member."""
        # Later ones are behind the others.
        return {
            (session.record.project_id, session.record.owner): session.record.node_id
            for session in self._sessions.values()
            if session.ready
        }

    def states(self) -> Counter[str]:
        """Return how many there are by state."""
        return Counter(state_name(session.record.state) for session in self._sessions.values())

    def change(self, session: ActiveSession, **values: Any) -> None:
        """Change what is known of a session, and write it soon."""
        if values.get("state") not in (None, session.record.state):
            log.info(
                "session.changed",
                session_id=session.session_id,
                state=state_name(values["state"]),
                node_id=values.get("node_id", session.record.node_id),
            )
        if values.get("state") == RUNNING and session.record.state != RUNNING:
            # The time before, in a pause or while it was made, does not count.
            session.told_at = asyncio.get_running_loop().time()
        for name, value in values.items():
            setattr(session.record, name, value)
        self.table.change(session.session_id, **values)
        session.changed.fire()

    def note_time(self, session: ActiveSession, used_milliseconds: int, activity: bytes) -> None:
        """Note what a node says of a session; it is written now and then."""
        now = asyncio.get_running_loop().time()
        session.told_at = now
        # A node that lost its count does not make a session cheaper.
        used = max(used_milliseconds, session.record.used_milliseconds)
        session.record.used_milliseconds, session.record.activity = used, activity
        if now - session.written_at > WRITE_SECONDS:
            session.written_at = now
            self.table.change(session.session_id, used_milliseconds=used, activity=activity)

    def end(
        self,
        session: ActiveSession,
        state: sessions_pb.SessionState.ValueType,
        reason: str,
        outcome: OffloadError | None = None,
    ) -> None:
        """Note that it is over; harmless when it already was.

        Args:
            session: the session.
            state: a final one.
            reason: one sentence for people.
            outcome: what those who wait for it are told.
        """
        record = session.record
        if record.state not in OPEN_STATES:
            return
        session.stop_timers()
        session.position = 0
        session.outcome = outcome
        values: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "ended_at": datetime.now(UTC),
            "used_milliseconds": record.used_milliseconds,
            "activity": b"",
        }
        for name, value in values.items():
            setattr(record, name, value)
        self._remove(session)
        self.table.change(session.session_id, **values)
        log.info(
            "session.ended",
            session_id=session.session_id,
            state=state_name(state),
            node_id=record.node_id,
            reason=reason,
        )
        session.changed.fire()
        self._on_change()

    def _remove(self, session: ActiveSession) -> None:
        self._sessions.pop(session.session_id, None)
        key = (session.record.token_id, session.record.request_id)
        if self._by_request.get(key) is session:
            del self._by_request[key]

    def close(self) -> None:
        """Stop all timers and write the times; the states stay as they are in the table."""
        for session in self._sessions.values():
            session.stop_timers()
            record = session.record
            if record.node_id:
                self.table.change(
                    record.session_id,
                    used_milliseconds=record.used_milliseconds,
                    activity=record.activity,
                )
            session.changed.fire()


def _nothing() -> None:
    """Stand in for a listener that is not there yet."""

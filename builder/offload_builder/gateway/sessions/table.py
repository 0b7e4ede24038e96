"""Sessions in the store: what was asked for, by whom, where it is and how it ended."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_proto.v1 import sessions_service_pb2 as sessions_pb

if TYPE_CHECKING:
    from datetime import datetime

    from offload_builder.gateway.store import Store

QUEUED = sessions_pb.SESSION_STATE_QUEUED
STARTING = sessions_pb.SESSION_STATE_STARTING
RUNNING = sessions_pb.SESSION_STATE_RUNNING
PAUSED = sessions_pb.SESSION_STATE_PAUSED
STOPPING = sessions_pb.SESSION_STATE_STOPPING
ENDED = sessions_pb.SESSION_STATE_ENDED
LOST = sessions_pb.SESSION_STATE_LOST
FAILED = sessions_pb.SESSION_STATE_FAILED

OPEN_STATES = frozenset({QUEUED, STARTING, RUNNING, PAUSED, STOPPING})
FINAL_STATES = frozenset({ENDED, LOST, FAILED})

MAX_LIST = 1000
MAX_TOTALS = 10_000
"""As many sessions may be open in a pool."""


def new_session_id() -> str:
    """Return 16 hexadecimal digits, 64 random bits."""
    return secrets.token_hex(8)


def state_name(state: int) -> str:
    """Return a state as people write it, for example `running`."""
    name = sessions_pb.SessionState.Name(sessions_pb.SessionState.ValueType(state))
    return name.removeprefix("SESSION_STATE_").lower()


@dataclass
class SessionRecord:
    """A session as it is stored. Times are UTC."""

    session_id: str
    request_id: str
    project_id: str
    owner: str
    token_id: str
    role: int
    name: str
    state: sessions_pb.SessionState.ValueType
    created_at: datetime
    spec: bytes = b""
    """A serialised SessionSpec."""
    trust_domain: str = ""
    shared_with: tuple[str, ...] = ()
    reason: str = ""
    node_id: str = ""
    ready_at: datetime | None = None
    ended_at: datetime | None = None
    limits: bytes = b""
    """A serialised SessionLimits."""
    activity: bytes = b""
    """A serialised SessionActivity, as it was when it was last written."""
    devices: tuple[str, ...] = ()
    engine_version: str = ""
    used_milliseconds: int = 0
    currency: str = ""
    """Of the rates when it started; empty where the pool had none."""
    micros_per_hour: int = 0
    stop_reason: str = ""
    """Set once somebody wants it to end; the node may not have heard of it yet."""

    @property
    def open(self) -> bool:
        """Whether it has not ended."""
        return self.state in OPEN_STATES

    @property
    def wish(self) -> sessions_pb.SessionSpec:
        """What its owner wanted."""
        return sessions_pb.SessionSpec.FromString(self.spec)

    def may_use(self, member: str) -> bool:
        """Return whether a member may work with it."""
        return member == self.owner or member in self.shared_with

    def row(self) -> dict[str, Any]:
        """Return the values of the table's columns."""
        lists = {"shared_with": list(self.shared_with), "devices": list(self.devices)}
        return self.__dict__ | lists


@dataclass(frozen=True)
class SessionTotal:
    """Several sessions of one owner at one price, summed up."""

    owner: str
    currency: str
    micros_per_hour: int
    sessions: int
    used_milliseconds: int
    newest_at: datetime
    """When the last of them was asked for."""

    @classmethod
    def of(cls, record: SessionRecord, used_milliseconds: int) -> SessionTotal:
        """Return one session, used for so long until now."""
        return cls(
            record.owner,
            record.currency,
            record.micros_per_hour,
            1,
            used_milliseconds,
            record.created_at,
        )


@dataclass(frozen=True)
class SessionQuery:
    """Which sessions are wanted; empty values choose all."""

    project_ids: tuple[str, ...] = ()
    member: str = ""
    """Only those that this member owns or may use."""
    since: datetime | None = None
    """Only those that were asked for, or were open, after that."""
    open_only: bool = False
    limit: int = MAX_LIST


class SessionsTable:
    """Reads and writes sessions."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def insert(self, record: SessionRecord) -> bool:
        """Write a new session; False when the same request has already made one."""
        row = record.row()
        try:
            await self._store.write(lambda db: db.execute(schema.sessions.insert(), row))
        except sa.exc.IntegrityError:
            return False
        return True

    def change(self, session_id: str, **values: Any) -> None:
        """Change columns of a session soon, in the order of the calls."""
        table = schema.sessions
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }
        statement = table.update().where(table.c.session_id == session_id).values(**plain)
        self._store.post(lambda db: db.execute(statement))

    async def find(self, session_id: str) -> SessionRecord | None:
        """Return a session, ended ones too, or None."""
        return await self._one(schema.sessions.c.session_id == session_id)

    async def find_request(self, token_id: str, request_id: str) -> SessionRecord | None:
        """Return the session that a request has made, or None."""
        table = schema.sessions
        return await self._one(table.c.token_id == token_id, table.c.request_id == request_id)

    async def _one(self, *conditions: sa.ColumnElement[bool]) -> SessionRecord | None:
        query = sa.select(schema.sessions).where(*conditions)
        row = await self._store.read(lambda db: db.execute(query).one_or_none())
        return None if row is None else _record(row)

    async def open(self) -> list[SessionRecord]:
        """Return the sessions that have not ended, oldest first."""
        table = schema.sessions
        query = (
            sa.select(table)
            .where(table.c.state.in_(OPEN_STATES))
            .order_by(table.c.created_at, table.c.session_id)
        )
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [_record(row) for row in rows]

    async def page(self, query: SessionQuery) -> list[SessionRecord]:
        """Return sessions, newest first."""
        table = schema.sessions
        wanted = sa.select(table).order_by(table.c.created_at.desc(), table.c.session_id)
        if query.project_ids:
            wanted = wanted.where(table.c.project_id.in_(query.project_ids))
        if query.open_only:
            wanted = wanted.where(table.c.state.in_(OPEN_STATES))
        if query.since is not None:
            after = sa.or_(table.c.ended_at.is_(None), table.c.ended_at > query.since)
            wanted = wanted.where(after)
        if query.member:
            # Databases search JSON in different ways; a quoted name is found as text in all.
            listed = sa.cast(table.c.shared_with, sa.Text).contains(
                json.dumps(query.member), autoescape=True
            )
            wanted = wanted.where(sa.or_(table.c.owner == query.member, listed))
        limited = wanted.limit(min(query.limit, MAX_LIST))
        rows = await self._store.read(lambda db: db.execute(limited).all())
        return [_record(row) for row in rows]

    async def used_since(
        self, project_id: str, since: datetime, owner: str = ""
    ) -> tuple[list[SessionTotal], list[SessionRecord]]:
        """Return sums of the sessions of a project that ended after a time, and the open ones.

        Args:
            project_id: the project.
            since: the time.
            owner: whose sessions; all members' when empty.
        """
        table = schema.sessions
        wanted = [table.c.project_id == project_id]
        if owner:
            wanted.append(table.c.owner == owner)
        used = sa.func.sum(table.c.used_milliseconds)
        # As many rows as members and rates, however many sessions there were.
        sums = (
            sa.select(
                table.c.owner,
                table.c.currency,
                table.c.micros_per_hour,
                sa.func.count(),
                used,
                sa.func.max(table.c.created_at),
            )
            .where(*wanted, table.c.state.not_in(OPEN_STATES), table.c.ended_at > since)
            .group_by(table.c.owner, table.c.currency, table.c.micros_per_hour)
            .order_by(used.desc(), table.c.owner)
            .limit(MAX_TOTALS)
        )
        still = sa.select(table).where(*wanted, table.c.state.in_(OPEN_STATES)).limit(MAX_TOTALS)
        totals, rows = await self._store.read(
            lambda db: (db.execute(sums).all(), db.execute(still).all())
        )
        # PostgreSQL sums integers up to a number without a bound.
        found = [
            SessionTotal(member, currency, price, count, int(time), newest)
            for member, currency, price, count, time, newest in totals
        ]
        return found, [_record(row) for row in rows]

    async def mark_stopped(self, session_id: str, reason: str) -> SessionRecord | None:
        """Note that an open session is to end, for the gateway to find; None for no such one."""
        table = schema.sessions
        change = (
            table.update()
            .where(
                table.c.session_id == session_id,
                table.c.state.in_(OPEN_STATES),
                table.c.stop_reason == "",
            )
            .values(stop_reason=reason)
        )
        await self._store.write(lambda db: db.execute(change))
        return await self.find(session_id)

    async def marked(self) -> dict[str, str]:
        """Return why open sessions are to end, by session."""
        table = schema.sessions
        query = sa.select(table.c.session_id, table.c.stop_reason).where(
            table.c.stop_reason != "", table.c.state.in_(OPEN_STATES)
        )
        rows = await self._store.read(lambda db: db.execute(query).all())
        return {row.session_id: row.stop_reason for row in rows}

    async def forget_ended(self, before: datetime) -> int:
        """Delete sessions that ended before a time; return how many."""
        table = schema.sessions
        change = table.delete().where(table.c.state.not_in(OPEN_STATES), table.c.ended_at < before)
        return await self._store.write(lambda db: db.execute(change).rowcount)


def _record(row: sa.Row[Any]) -> SessionRecord:
    values = dict(row._mapping)
    lists = {"shared_with": tuple(row.shared_with), "devices": tuple(row.devices)}
    return SessionRecord(**values | lists)

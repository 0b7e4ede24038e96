"""The audit log: who did what, from where, and with which result. Never a secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from offload_builder.gateway import schema
from offload_builder.gateway.plaintext import plain_line

if TYPE_CHECKING:
    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

OK = "ok"
OPERATOR = "operator"
"""Role of who uses a command on the gateway's machine."""
GATEWAY = "gateway"
"""Role of what the gateway does by itself."""
MAX_DETAIL = 500
MAX_SECRETS = 100
_LENGTHS = {
    "action": 40,
    "member": 64,
    "role": 12,
    "token_id": 12,
    "project_id": 40,
    "build_id": 12,
    "address": 64,
    "result": 40,
    "detail": MAX_DETAIL,
}
"""Characters that are kept; those of the columns."""
_ROW_BYTES = 120
"""What a row takes beside its texts, indexes included."""
_PRUNE_ROWS = 5_000
_LASTING_ROLES = (OPERATOR, GATEWAY, "admin")


@dataclass(frozen=True)
class Event:
    """One record. What a client has said is made plain text of one line.

    Attributes:
        action: what was done, for example "login" or "token.revoked".
        member: who did it; empty when that was not proved.
        role: of who did it.
        token_id: token, login or enrolment that stands behind it; as said when it was refused.
        project_id: project concerned.
        build_id: build concerned.
        address: IP address that the call came from; "local" for commands beside the gateway.
        result: "ok", or the wire name of the error.
        detail: what else is worth knowing.
        secret_ids: names of the secrets that a build asked for.
    """

    action: str
    member: str = ""
    role: str = ""
    token_id: str = ""
    project_id: str = ""
    build_id: str = ""
    address: str = ""
    result: str = OK
    detail: str = ""
    secret_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditRecord(Event):
    """A record as it is stored."""

    number: int = 0
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Query:
    """Which records are wanted; empty values choose all."""

    since: datetime | None = None
    member: str = ""
    project_id: str = ""
    action: str = ""
    after: int = 0
    """Number of the last record that is known."""
    limit: int = 1000


class AuditLog:
    """Records in the gateway's database; they are written in the order in which they are noted."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, event: Event) -> None:
        """Write a record soon; a failure is logged with the record."""
        row = _row(event)
        self._store.post(lambda db: db.execute(schema.audit.insert(), row))

    async def write(self, event: Event) -> None:
        """Write a record now."""
        row = _row(event)
        await self._store.write(lambda db: db.execute(schema.audit.insert(), row))

    async def read(self, query: Query) -> list[AuditRecord]:
        """Return the newest records that are wanted, oldest first; after a number, the next."""
        table = schema.audit
        wanted = sa.select(table).where(table.c.number > query.after)
        if query.since is not None:
            wanted = wanted.where(table.c.at >= query.since)
        for column, value in (("member", query.member), ("project_id", query.project_id)):
            if value:
                wanted = wanted.where(table.c[column] == value)
        if query.action:
            # "token" stands for all that begins with "token.".
            begins = table.c.action.startswith(f"{query.action}.", autoescape=True)
            wanted = wanted.where(sa.or_(table.c.action == query.action, begins))
        if query.after:
            ordered = wanted.order_by(table.c.number).limit(query.limit)
            rows = await self._store.read(lambda db: db.execute(ordered).all())
        else:
            newest = wanted.order_by(table.c.number.desc()).limit(query.limit)
            rows = (await self._store.read(lambda db: db.execute(newest).all()))[::-1]
        return [_record(row) for row in rows]

    async def prune(self, *, keep_bytes: int, retention_seconds: float) -> int:
        """Remove what is too old, and of what is too much the oldest; return how many.

        Records of members and refusals go before those of administrators, as long as they fill more
        than half.
        """
        removed = 0
        while count := await self._store.write(
            lambda db: _prune(db, keep_bytes, retention_seconds)
        ):
            removed += count
        if removed:
            log.info("audit.pruned", records=removed)
        return removed


def _prune(db: sa.Connection, keep_bytes: int, retention_seconds: float) -> int:
    """Remove some of what is too old or too much; return how many.

    What operators, administrators and the gateway itself did stays longer: who can only have calls
    refused, or begin builds and cancel them, must not drive that out of the log.
    """
    table = schema.audit
    minor = sa.or_(table.c.role.not_in(_LASTING_ROLES), table.c.result != OK)
    size = sa.select(sa.func.sum(table.c.size_bytes))
    too_much = (db.scalar(size) or 0) - keep_bytes
    too_many_minor = (db.scalar(size.where(minor)) or 0) - keep_bytes // 2
    if too_much > 0 and too_many_minor > 0:
        return _remove_oldest(db, minor, min(too_much, too_many_minor))
    excess = (db.scalar(sa.select(sa.func.sum(table.c.size_bytes))) or 0) - keep_bytes
    limit = datetime.now(UTC) - timedelta(seconds=retention_seconds)
    oldest = sa.select(table.c.number, table.c.at, table.c.size_bytes).order_by(table.c.number)
    last = 0
    for row in db.execute(oldest.limit(_PRUNE_ROWS)):
        if not (excess > 0 or (retention_seconds and row.at < limit)):
            break
        excess -= row.size_bytes
        last = row.number
    return db.execute(table.delete().where(table.c.number <= last)).rowcount if last else 0


def _remove_oldest(db: sa.Connection, which: sa.ColumnElement[bool], size: int) -> int:
    table = schema.audit
    oldest = sa.select(table.c.number, table.c.size_bytes).where(which).order_by(table.c.number)
    last = 0
    for row in db.execute(oldest.limit(_PRUNE_ROWS)):
        if size <= 0:
            break
        size -= row.size_bytes
        last = row.number
    return db.execute(table.delete().where(which, table.c.number <= last)).rowcount


def _row(event: Event) -> dict[str, object]:
    row: dict[str, object] = {
        name: plain_line(getattr(event, name), length) for name, length in _LENGTHS.items()
    }
    row["secret_ids"] = [plain_line(item, 100) for item in event.secret_ids[:MAX_SECRETS]]
    size = sum(len(str(value).encode()) for value in row.values())
    return row | {"at": datetime.now(UTC), "size_bytes": size + _ROW_BYTES}


def _record(row: sa.Row[tuple[object, ...]]) -> AuditRecord:
    values = dict(row._mapping)
    del values["size_bytes"]
    return AuditRecord(**values | {"secret_ids": tuple(values["secret_ids"])})

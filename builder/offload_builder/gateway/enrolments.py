"""Nodes in the store: which token has enrolled each, and whether it was revoked since.

A node's certificate names its enrolment, not the token: so one node can be revoked alone, and a
token for one node cannot enrol a second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_builder.gateway.tokens import TokenRecord, random_id
from offload_core.errors import AuthenticationError, NotFoundError
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from offload_builder.gateway.store import Store

ENROLMENT_PREFIX = "8"
"""Begins the ids of enrolments; no token's id has it, base32 ends at 7."""


def is_enrolment_id(token_id: str) -> bool:
    """Return whether an id is that of a node's enrolment."""
    return token_id.startswith(ENROLMENT_PREFIX)


def new_enrolment_id() -> str:
    """Return the id of a node that is being enrolled."""
    return ENROLMENT_PREFIX + random_id()[:11]


@dataclass(frozen=True)
class Enrolment:
    """One node as it was enrolled. Times are UTC.

    Attributes:
        enrolment_id: what its certificates name.
        token_id: the token that enrolled it.
        node_id: name of the node.
        key_hash: SHA-256 of its public key.
        created_at: when that was.
        expires_at: end of its newest certificate.
        renewed_at: when it got that; None when it still has its first one.
        last_used_at: when it called last, to the minute.
        revoked_at: when it was revoked, it or its token.
    """

    enrolment_id: str
    token_id: str
    node_id: str
    key_hash: str
    created_at: datetime
    expires_at: datetime
    renewed_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


class Enrolments:
    """Which nodes there are."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def enter(self, token: TokenRecord, wanted: Enrolment) -> Enrolment:
        """Write an enrolment down, or find the one that the same key has made with the token.

        Raises:
            AuthenticationError: the token was used as often as it may be.
        """
        return await self._store.write(lambda db: _enter(db, token, wanted))

    async def known(self, token_id: str, node_id: str, key_hash: str) -> Enrolment | None:
        """Return the enrolment that a token has made for a key, or None."""
        return await self._store.read(lambda db: _known(db, token_id, node_id, key_hash))

    async def find(self, enrolment_id: str) -> TokenRecord | None:
        """Return an enrolment as the record that certificates lead to, or None."""
        mine, theirs = schema.node_enrolments, schema.tokens
        query = (
            sa.select(mine, theirs.c.project_ids, theirs.c.revoked_at.label("token_revoked_at"))
            .join(theirs, theirs.c.token_id == mine.c.token_id)
            .where(mine.c.enrolment_id == enrolment_id)
        )
        row = await self._store.read(lambda db: db.execute(query).one_or_none())
        if row is None:
            return None
        return TokenRecord(
            token_id=row.enrolment_id,
            # No secret has an empty hash: nobody enrols with an enrolment.
            secret_hash="",
            name=row.node_id,
            role=identity_pb.ROLE_NODE,
            project_ids=tuple(row.project_ids),
            created_at=row.created_at,
            last_used_at=row.last_used_at,
            revoked_at=row.revoked_at or row.token_revoked_at,
            enrolled_with=row.token_id,
        )

    async def all(self) -> list[Enrolment]:
        """Return all enrolments, newest first; those of revoked tokens count as revoked."""
        mine, theirs = schema.node_enrolments, schema.tokens
        query = (
            sa.select(mine, theirs.c.revoked_at.label("token_revoked_at"))
            .join(theirs, theirs.c.token_id == mine.c.token_id)
            .order_by(mine.c.created_at.desc(), mine.c.enrolment_id)
        )
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [_enrolment(row) for row in rows]

    async def uses(self) -> dict[str, int]:
        """Return how many nodes each token has enrolled."""
        table = schema.node_enrolments
        query = sa.select(table.c.token_id, sa.func.count()).group_by(table.c.token_id)
        rows = await self._store.read(lambda db: db.execute(query).all())
        return {row[0]: row[1] for row in rows}

    async def renewed(self, enrolment_id: str, expires_at: datetime) -> None:
        """Note that a node has a new certificate."""
        table = schema.node_enrolments
        change = (
            table.update()
            .where(table.c.enrolment_id == enrolment_id)
            .values(renewed_at=datetime.now(UTC), expires_at=expires_at)
        )
        await self._store.write(lambda db: db.execute(change))

    async def revoke(self, enrolment_id: str) -> None:
        """End one enrolment; harmless when there is none or it has ended."""
        await self._revoke(schema.node_enrolments.c.enrolment_id == enrolment_id)

    async def revoke_node(self, node_id: str) -> list[str]:
        """End all enrolments of a name, and return their ids.

        Raises:
            NotFoundError: there is no such node that is not revoked.
        """
        found = await self._revoke(schema.node_enrolments.c.node_id == node_id)
        if not found:
            raise NotFoundError(
                f'there is no enrolled node "{node_id[:40]}"',
                hint="list them with: offload-builder node list",
            )
        return found

    async def _revoke(self, which: sa.ColumnElement[bool]) -> list[str]:
        table = schema.node_enrolments
        open_ones = sa.and_(which, table.c.revoked_at.is_(None))

        def work(db: sa.Connection) -> list[str]:
            found = list(db.scalars(sa.select(table.c.enrolment_id).where(open_ones)))
            db.execute(table.update().where(open_ones).values(revoked_at=datetime.now(UTC)))
            return found

        return await self._store.write(work)

    def note_use(self, enrolment_id: str, now: datetime) -> None:
        """Remember the use of a certificate soon."""
        table = schema.node_enrolments
        change = table.update().where(table.c.enrolment_id == enrolment_id)
        self._store.post(lambda db: db.execute(change.values(last_used_at=now)))


def _known(db: sa.Connection, token_id: str, node_id: str, key_hash: str) -> Enrolment | None:
    table = schema.node_enrolments
    query = sa.select(table).where(
        table.c.token_id == token_id,
        table.c.node_id == node_id,
        table.c.key_hash == key_hash,
        table.c.revoked_at.is_(None),
    )
    row = db.execute(query).first()
    return None if row is None else Enrolment(**row._mapping)


def _enter(db: sa.Connection, token: TokenRecord, wanted: Enrolment) -> Enrolment:
    table = schema.node_enrolments
    before = _known(db, token.token_id, wanted.node_id, wanted.key_hash)
    if before is not None:
        change = table.update().where(table.c.enrolment_id == before.enrolment_id)
        db.execute(change.values(expires_at=wanted.expires_at))
        return before
    query = sa.select(table.c.node_id, table.c.created_at).where(table.c.token_id == token.token_id)
    used = db.execute(query.order_by(table.c.created_at)).all()
    if token.max_uses is not None and len(used) >= token.max_uses:
        raise AuthenticationError(
            f"the token {token.token_id} was used as often as it may be; the last node that it "
            f'enrolled is "{used[-1].node_id}", at {used[-1].created_at:%Y-%m-%d %H:%M} UTC',
            hint="make a new one with: offload-builder token create --role node NAME",
        )
    db.execute(table.insert(), dict(wanted.__dict__))
    return wanted


def _enrolment(row: sa.Row[Any]) -> Enrolment:
    values = dict(row._mapping)
    token_revoked_at = values.pop("token_revoked_at")
    return Enrolment(**values | {"revoked_at": values["revoked_at"] or token_revoked_at})

"""Logins by identity providers in the store: what a token of theirs was exchanged for."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_builder.gateway.tokens import TokenRecord, random_id
from offload_core.errors import AuthenticationError

if TYPE_CHECKING:
    from offload_builder.gateway.oidc.idtoken import VerifiedToken
    from offload_builder.gateway.oidc.rules import Grant
    from offload_builder.gateway.store import Store

LOGIN_PREFIX = "9"
"""Begins the ids of logins; no token's id has it, base32 ends at 7."""

KEEP_ENDED = timedelta(days=7)
"""How long `offload-builder identity logins` shows what has ended."""


def is_login_id(token_id: str) -> bool:
    """Return whether an id is that of a login, not of a token of ours."""
    return token_id.startswith(LOGIN_PREFIX)


@dataclass(frozen=True)
class UsedToken:
    """When a token was exchanged before."""

    at: datetime


class ExternalLogins:
    """Who has logged in with a provider's token, and with which."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def enter(self, token: VerifiedToken, grant: Grant) -> TokenRecord:
        """Write a login down; a token that may be used again gives the login that it gave before.

        A login that was revoked stays so, also for the token behind it. What a later use stands
        for is what the rules say then.

        Raises:
            AuthenticationError: the token was used, or its login was revoked.
        """
        now = datetime.now(UTC)
        row = {
            "token_id": LOGIN_PREFIX + random_id()[:11],
            "use_key": token.use_key,
            "name": grant.member,
            "role": grant.role,
            "project_ids": list(grant.projects),
            "created_at": now,
            "expires_at": now + timedelta(seconds=grant.lifetime),
            "last_used_at": now,
            "token_expires_at": _instant(token.expires_at + token.issuer.clock_skew),
            "identity": grant.identity.SerializeToString(),
        }
        replay = token.issuer.replay
        try:
            found = await self._store.write(lambda db: _enter(db, row, replay))
        except sa.exc.IntegrityError:
            # Another process has taken the same token in the same moment.
            found = await self._store.write(lambda db: _enter(db, row, replay))
        if isinstance(found, UsedToken):
            raise AuthenticationError(
                f"this token was already used at {found.at:%H:%M:%S} UTC, and is good for one "
                "login only",
                hint="ask the identity provider for a new one",
            )
        found.check_usable(now)
        return found

    async def find(self, token_id: str) -> TokenRecord | None:
        """Return a login as the record that certificates lead to, or None."""
        table = schema.external_logins
        query = sa.select(table).where(table.c.token_id == token_id)
        row = await self._store.read(lambda db: db.execute(query).one_or_none())
        return None if row is None else _record(row)

    async def of_member(self, name: str) -> list[TokenRecord]:
        """Return the logins of a member that are remembered."""
        table = schema.external_logins
        query = sa.select(table).where(table.c.name == name)
        return [_record(row) for row in await self._store.read(lambda db: db.execute(query).all())]

    async def list(self, limit: int = 200) -> list[TokenRecord]:
        """Return logins, newest first."""
        table = schema.external_logins
        query = sa.select(table).order_by(table.c.created_at.desc()).limit(limit)
        return [_record(row) for row in await self._store.read(lambda db: db.execute(query).all())]

    async def revoke(self, token_id: str) -> None:
        """End a login; harmless when there is none or it has ended."""
        table = schema.external_logins
        change = (
            table.update()
            .where(table.c.token_id == token_id, table.c.revoked_at.is_(None))
            .values(revoked_at=datetime.now(UTC))
        )
        await self._store.write(lambda db: db.execute(change))

    def note_use(self, token_id: str, now: datetime) -> None:
        """Remember the use of a login soon."""
        table = schema.external_logins
        change = table.update().where(table.c.token_id == token_id).values(last_used_at=now)
        self._store.post(lambda db: db.execute(change))

    async def forget_ended(self) -> int:
        """Delete logins that ended a week ago; tokens that could come again are kept."""
        table = schema.external_logins
        limit = datetime.now(UTC) - KEEP_ENDED
        change = table.delete().where(table.c.expires_at < limit, table.c.token_expires_at < limit)
        return await self._store.write(lambda db: db.execute(change).rowcount)


def _enter(db: sa.Connection, row: dict[str, Any], replay: str) -> TokenRecord | UsedToken:
    table = schema.external_logins
    same = table.c.use_key == row["use_key"]
    before = db.execute(sa.select(table).where(same)).one_or_none()
    if before is None:
        db.execute(table.insert(), row)
    elif replay == "once":
        return UsedToken(before.created_at)
    elif before.revoked_at is None:
        kept = ("token_id", "use_key", "created_at")
        db.execute(
            table.update()
            .where(same)
            .values({name: value for name, value in row.items() if name not in kept})
        )
    return _record(db.execute(sa.select(table).where(same)).one())


def _record(row: sa.Row[Any]) -> TokenRecord:
    return TokenRecord(
        token_id=row.token_id,
        # No secret has this hash: nobody logs in with a login.
        secret_hash=secrets.token_hex(32),
        name=row.name,
        role=row.role,
        project_ids=tuple(row.project_ids),
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
        identity=row.identity,
    )


def _instant(seconds: float) -> datetime:
    # Far ends are all the same, and beyond what a datetime can be.
    return datetime.fromtimestamp(min(seconds, 32_503_680_000.0), UTC)

"""Tokens and projects in the store."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_builder.gateway.enrolments import Enrolments, is_enrolment_id
from offload_builder.gateway.oidc.logins import ExternalLogins, is_login_id
from offload_builder.gateway.tokens import TokenRecord, TokenText, new_record
from offload_core.errors import NotFoundError, UsageError
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from offload_builder.gateway.store import Store

PROJECT_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
DEFAULT_PROJECT = "default"

_LAST_USED_STEP = timedelta(minutes=1)


@dataclass(frozen=True)
class ProjectRecord:
    """A project as it is stored."""

    project_id: str
    created_at: datetime


class Members:
    """Who may do what, and the projects in which they do it."""

    def __init__(self, store: Store, ca_fingerprint: Callable[[], str]) -> None:
        """Keep them in a store; `ca_fingerprint` names the CA for new tokens."""
        self._store = store
        self._ca_fingerprint = ca_fingerprint
        self.external = ExternalLogins(store)
        self.enrolments = Enrolments(store)

    async def create_token(
        self,
        *,
        name: str,
        role: identity_pb.Role.ValueType,
        project_ids: Iterable[str] = (),
        expires_at: datetime | None = None,
        max_uses: int | None = None,
    ) -> tuple[TokenRecord, TokenText]:
        """Make a token; its text exists only in the return value.

        Args:
            name: of the member, or of the pool of nodes.
            role: what it may do.
            project_ids: empty for all.
            expires_at: None for never.
            max_uses: how many nodes it may enrol: None for one, 0 for any number.

        Raises:
            UsageError: name, role or end cannot be used, or the name is one of another trust.
            NotFoundError: one of the projects does not exist.
        """
        text = TokenText.generate(self._ca_fingerprint())
        record = new_record(
            text,
            name=name,
            role=role,
            project_ids=project_ids,
            expires_at=expires_at,
            now=datetime.now(UTC),
            max_uses=max_uses,
        )
        for project_id in record.project_ids:
            await self.project(project_id)
        row = dataclasses.asdict(record) | {"project_ids": list(record.project_ids)}
        del row["identity"], row["enrolled_with"]

        def work(db: sa.Connection) -> None:
            _check_trust(db, record)
            db.execute(schema.tokens.insert(), row)

        await self._store.write(work)
        return record, text

    async def find_token(self, token_id: str) -> TokenRecord | None:
        """Return a token, or a login by an identity provider, None when there is none."""
        if is_login_id(token_id):
            return await self.external.find(token_id)
        if is_enrolment_id(token_id):
            return await self.enrolments.find(token_id)
        query = sa.select(schema.tokens).where(schema.tokens.c.token_id == token_id)
        row = await self._store.read(lambda db: db.execute(query).one_or_none())
        return None if row is None else _token(row)

    async def list_tokens(self) -> list[TokenRecord]:
        """Return all tokens, newest first."""
        query = sa.select(schema.tokens).order_by(
            schema.tokens.c.created_at.desc(), schema.tokens.c.token_id
        )
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [_token(row) for row in rows]

    async def tokens_of(self, name: str) -> list[TokenRecord]:
        """Return the tokens and the logins of a member, those that have ended as well."""
        table = schema.tokens
        query = sa.select(table).where(table.c.name == name, table.c.role != identity_pb.ROLE_NODE)
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [_token(row) for row in rows] + await self.external.of_member(name)

    async def revoke_token(self, token_id: str) -> TokenRecord:
        """End a token; the time of the first revocation stays.

        Raises:
            NotFoundError: there is no such token.
        """
        table = schema.tokens
        change = (
            table.update()
            .where(table.c.token_id == token_id, table.c.revoked_at.is_(None))
            .values(revoked_at=datetime.now(UTC))
        )
        if is_login_id(token_id):
            await self.external.revoke(token_id)
        elif is_enrolment_id(token_id):
            await self.enrolments.revoke(token_id)
        else:
            await self._store.write(lambda db: db.execute(change))
        record = await self.find_token(token_id)
        if record is None:
            raise NotFoundError(
                f'there is no token with the id "{token_id[:40]}"',
                hint="list them with: offload-builder token list",
            )
        return record

    def note_use(self, record: TokenRecord, now: datetime) -> None:
        """Remember the use of a token, to the minute."""
        if record.last_used_at is not None and now - record.last_used_at < _LAST_USED_STEP:
            return
        if is_login_id(record.token_id):
            self.external.note_use(record.token_id, now)
            return
        if is_enrolment_id(record.token_id):
            self.enrolments.note_use(record.token_id, now)
            return
        table = schema.tokens
        change = table.update().where(table.c.token_id == record.token_id).values(last_used_at=now)
        self._store.post(lambda db: db.execute(change))

    async def create_project(self, project_id: str) -> ProjectRecord:
        """Make a project.

        Raises:
            UsageError: the name cannot be used or is taken.
        """
        if PROJECT_ID.fullmatch(project_id) is None:
            raise UsageError(
                f'"{project_id[:80]}" cannot be the name of a project: '
                "at most 40 lower-case letters, digits and dashes, no dash at an end"
            )
        record = ProjectRecord(project_id, datetime.now(UTC))
        try:
            await self._store.write(
                lambda db: db.execute(schema.projects.insert(), dataclasses.asdict(record))
            )
        except sa.exc.IntegrityError as error:
            raise UsageError(f'there is already a project "{project_id}"') from error
        return record

    async def list_projects(self) -> list[ProjectRecord]:
        """Return all projects by name."""
        query = sa.select(schema.projects).order_by(schema.projects.c.project_id)
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [ProjectRecord(row.project_id, row.created_at) for row in rows]

    async def project(
        self, project_id: str, *, visible_to: TokenRecord | None = None
    ) -> ProjectRecord:
        """Return a project.

        Args:
            project_id: its name.
            visible_to: names of other projects are told only as far as this token opens them.

        Raises:
            NotFoundError: there is none; the sentence names the ones that exist.
        """
        known = await self.list_projects()
        for record in known:
            if record.project_id == project_id:
                return record
        names = [
            record.project_id
            for record in known
            if visible_to is None or visible_to.may_use(record.project_id)
        ]
        raise NotFoundError(
            f'there is no project "{project_id[:80]}"; {_known_projects(names)}',
            hint="an administrator can make it with: offload-builder project create NAME",
        )

    async def has_admin(self) -> bool:
        """Return whether an administrator's token was ever made, revoked ones included."""
        return any(record.is_admin for record in await self.list_tokens())


def _known_projects(names: Sequence[str]) -> str:
    return f"known projects are {', '.join(names)}" if names else "there are no projects yet"


def _token(row: sa.Row[Any]) -> TokenRecord:
    values = dict(row._mapping)
    return TokenRecord(**values | {"project_ids": tuple(row.project_ids)})


def _check_trust(db: sa.Connection, record: TokenRecord) -> None:
    """Refuse a name that is both that of an untrusted member and of another one.

    Nodes know members by the name in their certificates, which outlive a revoked token: with the
    same name an untrusted member could fetch what the builds of the other one make.

    Raises:
        UsageError: with the name.
    """
    table = schema.tokens
    if record.is_node:
        return
    query = sa.select(table.c.role).where(
        table.c.name == record.name, table.c.role != identity_pb.ROLE_NODE
    )
    untrusted = record.role == identity_pb.ROLE_UNTRUSTED
    if any((role == identity_pb.ROLE_UNTRUSTED) != untrusted for role in db.scalars(query)):
        other = "a trusted" if untrusted else "an untrusted"
        raise UsageError(
            f'"{record.name}" is, or was, the name of {other} member, and nodes know members by '
            "their names; choose another name"
        )

"""Egress policies in the gateway's database: every version with its author and time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from offload_builder.egress.policy.differences import Change, differences
from offload_builder.egress.policy.merging import Merged, merge
from offload_builder.egress.policy.model import DEFAULT_POLICY, Layer, Policy
from offload_builder.egress.policy.reading import MAX_FILE_BYTES, Finding, read_text
from offload_builder.gateway import schema
from offload_builder.gateway.plaintext import plain_line
from offload_core.errors import ConfigError, NotFoundError, UsageError

if TYPE_CHECKING:
    from offload_builder.gateway.store import Store

POOL = ""
"""Scope of the pool's policy; those of projects have their names."""
DEFAULT_TEXT = 'posture = "open"\n'
MAX_KNOWN = 16
"""Policies of projects that are kept as they were read; each takes up to some 10 MB."""
MAX_ALL_BYTES = 8 << 20
"""Texts of all policies that hold: nodes get them in one message."""


@dataclass(frozen=True)
class StoredPolicy:
    """One version.

    Attributes:
        scope: `POOL`, or a project.
        version: from 1 on.
        file: name of the file that it came from.
        text: TOML.
        author: who applied it.
        note: why, or which version it repeats.
    """

    scope: str
    version: int
    file: str
    text: str
    author: str
    applied_at: datetime
    note: str = ""

    def policy(self) -> Policy:
        """Return what it says.

        Raises:
            ConfigError: this program cannot read it.
        """
        layer = Layer.PROJECT if self.scope else Layer.POOL
        reading = read_text(self.text, file=self.file, layer=layer, version=self.version)
        return reading.require()


@dataclass(frozen=True)
class Applied:
    """What came of a policy that was applied.

    Attributes:
        version: the newest one now.
        changes: against the newest one before.
        warnings: about the policy, and about projects whose additions no longer count.
    """

    version: int
    changes: tuple[Change, ...]
    warnings: tuple[Finding, ...] = ()


class EgressPolicies:
    """The policies of a gateway."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reading = asyncio.Lock()
        self._known: OrderedDict[tuple[str, int, int], Merged] = OrderedDict()
        """By project, version of the pool and version of the project, the last used at the end."""

    async def versions_now(self) -> dict[str, int]:
        """Return the newest version by scope."""
        table = schema.egress_policies
        query = sa.select(table.c.scope, sa.func.max(table.c.version)).group_by(table.c.scope)
        rows = await self._store.read(lambda db: db.execute(query).all())
        return {row[0]: row[1] for row in rows}

    async def current(self) -> dict[str, StoredPolicy]:
        """Return what holds now by scope, that of the pool first."""
        return await self._store.read(_current)

    async def versions(self, scope: str) -> list[StoredPolicy]:
        """Return all versions of one policy, newest first."""
        table = schema.egress_policies
        query = sa.select(table).where(table.c.scope == scope).order_by(table.c.version.desc())
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [StoredPolicy(**row._mapping) for row in rows]

    async def get(self, scope: str, version: int | None = None) -> StoredPolicy:
        """Return one version, the newest by default; version 0 is the built-in one.

        Raises:
            NotFoundError: there is no such version.
        """
        table = schema.egress_policies
        query = sa.select(table).where(table.c.scope == scope).order_by(table.c.version.desc())
        if version is not None:
            query = query.where(table.c.version == version)
        row = await self._store.read(lambda db: db.execute(query.limit(1)).one_or_none())
        if row is not None:
            return StoredPolicy(**row._mapping)
        if version in (None, 0):
            text = "" if scope else DEFAULT_TEXT
            return StoredPolicy(scope, 0, "built in", text, "", schema.EPOCH)
        raise NotFoundError(
            f"{_owner(scope)} has no version {version} of its policy",
            hint="offload-builder policy versions lists them",
        )

    async def merged(self, project_id: str = "") -> tuple[Merged, int]:
        """Return what holds for a project, or the pool alone, and the project's version.

        Raises:
            ConfigError: a stored policy cannot be read by this program.
        """
        async with self._reading:
            # To read a large policy takes half a second, and every member may ask.
            versions = await self.versions_now()
            own = versions.get(project_id, 0) if project_id else 0
            key = project_id, versions.get(POOL, 0), own
            known = self._known.pop(key, None)
            if known is not None:
                found = known
            else:
                current = await self.current()
                found, own = await asyncio.to_thread(_merged, current, project_id)
                key = project_id, current[POOL].version if POOL in current else 0, own
            self._known[key] = found
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            return found, own

    async def apply(
        self,
        scope: str,
        text: str,
        *,
        file: str,
        author: str,
        note: str = "",
        expected: int = 0,
        dry_run: bool = False,
    ) -> Applied:
        """Make a policy the one that holds. The project exists.

        Args:
            scope: `POOL`, or a project.
            text: TOML.
            file: name of its file.
            author: who does it.
            note: why.
            expected: version that must be the newest one; 0 for any.
            dry_run: check only.

        Raises:
            ConfigError: the policy cannot be used, with file and lines; nothing has changed.
            UsageError: another version came first.
        """
        found = StoredPolicy(
            scope,
            0,
            plain_line(file, 200),
            text,
            plain_line(author, 64),
            datetime.now(UTC),
            plain_line(note, 300),
        )
        return await self._apply(found, expected=expected, dry_run=dry_run, again=False)

    async def _apply(
        self, found: StoredPolicy, *, expected: int, dry_run: bool, again: bool
    ) -> Applied:
        scope = found.scope
        current = await self.current()
        before = current.get(scope)
        now = before.version if before else 0
        if expected and expected != now:
            raise _overtaken(scope, now)
        changes, warnings = await asyncio.to_thread(_check, found, current, again)
        if dry_run or (before is not None and before.text == found.text):
            return Applied(now, changes, warnings)
        added = replace(found, version=now + 1)
        try:
            await self._store.write(lambda db: _insert(db, added))
        except sa.exc.IntegrityError as error:
            raise _overtaken(scope, now + 1) from error
        return Applied(added.version, changes, warnings)

    async def rollback(self, scope: str, version: int, *, author: str) -> Applied:
        """Make an earlier version the newest one again; rules that have expired stay expired.

        Raises:
            NotFoundError: there is no such version.
            ConfigError: it cannot be used any more.
        """
        old = await self.get(scope, version)
        found = replace(
            old,
            version=0,
            author=plain_line(author, 64),
            applied_at=datetime.now(UTC),
            note=f"version {version} again",
        )
        return await self._apply(found, expected=0, dry_run=False, again=True)


def _current(db: sa.Connection) -> dict[str, StoredPolicy]:
    table = schema.egress_policies
    newest = (
        sa.select(table.c.scope, sa.func.max(table.c.version).label("version"))
        .group_by(table.c.scope)
        .subquery()
    )
    query = (
        sa.select(table)
        .join(
            newest,
            sa.and_(table.c.scope == newest.c.scope, table.c.version == newest.c.version),
        )
        .order_by(table.c.scope)
    )
    return {row.scope: StoredPolicy(**row._mapping) for row in db.execute(query)}


def _insert(db: sa.Connection, added: StoredPolicy) -> None:
    # Two who apply at once want the same number: the second one violates the primary key.
    db.execute(schema.egress_policies.insert(), vars(added))


def _merged(current: dict[str, StoredPolicy], project_id: str) -> tuple[Merged, int]:
    pool = current[POOL].policy() if POOL in current else DEFAULT_POLICY
    own = current.get(project_id) if project_id else None
    return merge(pool, own.policy() if own else None), own.version if own else 0


def _check(
    found: StoredPolicy, current: dict[str, StoredPolicy], again: bool
) -> tuple[tuple[Change, ...], tuple[Finding, ...]]:
    """Return changes and warnings of a new version.

    Raises:
        ConfigError: it cannot be used.
    """
    size = len(found.text.encode())
    if size > MAX_FILE_BYTES:
        raise ConfigError(f"{found.file} is larger than {MAX_FILE_BYTES >> 20} MiB")
    others = sum(len(item.text.encode()) for key, item in current.items() if key != found.scope)
    if size + others > MAX_ALL_BYTES:
        raise ConfigError(
            f"with {found.file} the policies of pool and projects would have more than "
            f"{MAX_ALL_BYTES >> 20} MiB together; make them shorter, with networks instead of "
            "addresses and *.domain instead of hosts"
        )
    layer = Layer.PROJECT if found.scope else Layer.POOL
    # Of an earlier version, rules may have expired.
    reading = read_text(found.text, file=found.file, layer=layer, version=int(again))
    policy = reading.require()
    warnings = list(reading.findings)
    if found.scope:
        refused = merge(_readable(current.get(POOL)) or DEFAULT_POLICY, policy).refused
        if refused:
            raise ConfigError("\n".join(str(item) for item in refused))
    else:
        for scope, item in current.items():
            if scope:
                refused = merge(policy, _readable(item)).refused
                warnings += [
                    replace(one, serious=False, sentence=f"project {scope}: {one.sentence}")
                    for one in refused
                ]
    before = _readable(current.get(found.scope))
    # Without a policy of its own a project adds nothing.
    nothing = Policy(posture=None, layer=Layer.PROJECT) if found.scope else DEFAULT_POLICY
    return differences(before or nothing, policy), tuple(warnings)


def _readable(item: StoredPolicy | None) -> Policy | None:
    """Return a stored policy; None for none, and for one that only another program reads.

    It must not keep a better one out.
    """
    try:
        return item.policy() if item is not None else None
    except ConfigError:
        return None


def _overtaken(scope: str, version: int) -> UsageError:
    return UsageError(
        f"{_owner(scope)} has version {version} of its policy by now",
        hint="look at it with: offload-builder policy diff FILE, then apply yours again",
    )


def _owner(scope: str) -> str:
    return f'the project "{scope}"' if scope else "the pool"

"""Builds in the store: what was asked for, by whom, where it ran and how it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from offload_builder.gateway import schema
from offload_core.errors import NotFoundError, UsageError
from offload_proto.v1 import builds_service_pb2 as builds_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.gateway.store import Store

MAX_PAGE = 1000
DEFAULT_PAGE = 50
FINAL_STATES = frozenset(
    {
        builds_pb.BUILD_STATE_SUCCEEDED,
        builds_pb.BUILD_STATE_FAILED,
        builds_pb.BUILD_STATE_CANCELED,
        builds_pb.BUILD_STATE_LOST,
    }
)

START_AGAIN = "; start the build again"
"""End of what is said of a lost build, as long as nobody has."""

_BUILD_ID = re.compile(r"[a-z2-7]{1,12}")
_PAGE_TOKEN = re.compile(r"(\d{1,18})-([a-z2-7]{12})")
_SWEEP_BUILDS = 200
_RECENT = timedelta(days=1)


@dataclass(frozen=True)
class BuildRecord:
    """A build as it is stored. Times are UTC."""

    build_id: str
    request_id: str
    project_id: str
    member: str
    token_id: str
    role: int
    name: str
    state: builds_pb.BuildState.ValueType
    created_at: datetime
    dockerfile_path: str = ""
    target: str = ""
    platforms: tuple[str, ...] = ()
    vcs_branch: str = ""
    vcs_revision: str = ""
    vcs_target_branch: str = ""
    cache_choice: bytes = b""
    """A serialised CacheChoice."""
    group_id: str = ""
    """The same for all parts of one image; empty for a build that is whole."""
    preferred_platform: str = ""
    """Of the client; only where it names no platforms."""
    identity: bytes = b""
    """A serialised ExternalIdentity; empty behind a token of ours."""
    node_id: str = ""
    started_at: datetime | None = None
    completed_at: datetime | None = None
    error: str = ""
    stats: bytes = b""
    image_digest: str = ""
    cache_state: builds_pb.CacheState.ValueType = builds_pb.CACHE_STATE_UNSPECIFIED
    repeat_of: str = ""
    """The lost build that this one repeats."""
    repeated_by: str = ""
    image_saved: bool = False
    """The shared store keeps the image."""
    client: str = ""
    """Program that has started it; empty for our own."""
    network_policy: bytes = b""
    """A serialised NetworkPolicy, without its text when the build is over; empty for none."""
    devices: tuple[str, ...] = ()
    """That it is allowed to use."""

    def row(self) -> dict[str, Any]:
        """Return the values of the table's columns."""
        lists = {"platforms": list(self.platforms), "devices": list(self.devices)}
        return self.__dict__ | lists


class History:
    """Reads and writes builds."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def insert(self, record: BuildRecord) -> bool:
        """Write a new build; False when the same request has already made one."""
        try:
            await self._store.write(lambda db: db.execute(schema.builds.insert(), record.row()))
        except sa.exc.IntegrityError:
            return False
        return True

    def change(self, build_id: str, **values: Any) -> None:
        """Change columns of a build soon, in the order of the calls."""
        table = schema.builds
        statement = table.update().where(table.c.build_id == build_id).values(**values)
        self._store.post(lambda db: db.execute(statement))

    async def find(self, build_id: str) -> BuildRecord | None:
        """Return the build with exactly this id, or None."""
        query = sa.select(schema.builds).where(schema.builds.c.build_id == build_id)
        row = await self._store.read(lambda db: db.execute(query).one_or_none())
        return None if row is None else _build(row)

    async def find_request(self, token_id: str, request_id: str) -> BuildRecord | None:
        """Return the build that a request has made, or None."""
        table = schema.builds
        query = sa.select(table).where(
            table.c.token_id == token_id, table.c.request_id == request_id
        )
        row = await self._store.read(lambda db: db.execute(query).one_or_none())
        return None if row is None else _build(row)

    async def resolve(self, prefix: str, project_ids: Sequence[str]) -> BuildRecord:
        """Return the one build whose id begins with `prefix`.

        Args:
            prefix: at least one character.
            project_ids: only builds of these projects are seen; empty for all.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several.
        """
        missing = NotFoundError(
            f'there is no build "{prefix[:40]}"',
            hint="list the builds with: offload builds",
        )
        if _BUILD_ID.fullmatch(prefix) is None:
            raise missing
        table = schema.builds
        query = (
            sa.select(table)
            # A range can use the index, which LIKE cannot on every database.
            .where(table.c.build_id >= prefix, table.c.build_id <= prefix.ljust(12, "z"))
            .limit(2)
        )
        if project_ids:
            query = query.where(table.c.project_id.in_(project_ids))
        rows = await self._store.read(lambda db: db.execute(query).all())
        if not rows:
            raise missing
        if len(rows) > 1:
            raise UsageError(
                f'several builds begin with "{prefix}"; write more characters of the id'
            )
        return _build(rows[0])

    async def page(
        self, project_ids: Sequence[str], *, size: int, token: str
    ) -> tuple[list[BuildRecord], str]:
        """Return builds, newest first, and the token of the next page.

        Raises:
            UsageError: the size or the token cannot be used.
        """
        if not 0 <= size <= MAX_PAGE:
            raise UsageError(f"page_size must be between 0 and {MAX_PAGE}")
        size = size or DEFAULT_PAGE
        table = schema.builds
        query = (
            sa.select(table)
            .order_by(table.c.created_at.desc(), table.c.build_id.desc())
            .limit(size + 1)
        )
        if project_ids:
            query = query.where(table.c.project_id.in_(project_ids))
        if token:
            created_at, build_id = _parse_page_token(token)
            query = query.where(
                sa.or_(
                    table.c.created_at < created_at,
                    sa.and_(table.c.created_at == created_at, table.c.build_id < build_id),
                )
            )
        rows = await self._store.read(lambda db: db.execute(query).all())
        records = [_build(row) for row in rows[:size]]
        return records, _page_token(records[-1]) if len(rows) > size else ""

    async def earlier_alike(self, record: BuildRecord, *, limit: int) -> list[BuildRecord]:
        """Return builds before one with its Dockerfile and target that ended well, newest first."""
        table = schema.builds
        query = (
            sa.select(table)
            .where(
                table.c.project_id == record.project_id,
                table.c.created_at < record.created_at,
                table.c.state == builds_pb.BUILD_STATE_SUCCEEDED,
                table.c.dockerfile_path == record.dockerfile_path,
                table.c.target == record.target,
            )
            .order_by(table.c.created_at.desc(), table.c.build_id.desc())
            .limit(limit)
        )
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [_build(row) for row in rows]

    async def recent_projects(self, limit: int) -> list[str]:
        """Return the projects that have built in the last day, the busiest first."""
        table = schema.builds
        count = sa.func.count()
        query = (
            sa.select(table.c.project_id)
            .where(table.c.created_at > datetime.now(UTC) - _RECENT)
            .group_by(table.c.project_id)
            .order_by(count.desc(), table.c.project_id)
            .limit(limit)
        )
        return await self._store.read(lambda db: list(db.scalars(query)))

    async def unfinished(self) -> list[BuildRecord]:
        """Return the builds that had not ended when the gateway did, oldest first."""
        table = schema.builds
        states = (builds_pb.BUILD_STATE_QUEUED, builds_pb.BUILD_STATE_RUNNING)
        query = sa.select(table).where(table.c.state.in_(states)).order_by(table.c.created_at)
        rows = await self._store.read(lambda db: db.execute(query).all())
        return [_build(row) for row in rows]

    async def delete_older_than(self, limit: datetime) -> int:
        """Forget builds that ended before `limit`, with their logs; return how many."""
        table, logs = schema.builds, schema.build_logs
        query = (
            sa.select(table.c.build_id)
            .where(table.c.completed_at < limit, table.c.state.in_(FINAL_STATES))
            .limit(_SWEEP_BUILDS)
        )

        def sweep(db: sa.Connection) -> int:
            old = list(db.scalars(query))
            db.execute(logs.delete().where(logs.c.build_id.in_(old)))
            db.execute(table.delete().where(table.c.build_id.in_(old)))
            return len(old)

        total = 0
        # Small transactions, so that others get their turn in between.
        while (count := await self._store.write(sweep)) > 0:
            total += count
        return total


def build_message(record: BuildRecord) -> builds_pb.Build:
    """Return a build as the API shows it."""
    error = record.error
    if record.repeated_by:
        error = error.removesuffix(START_AGAIN)
    message = builds_pb.Build(
        build_id=record.build_id,
        project_id=record.project_id,
        member=record.member,
        name=record.name,
        state=record.state,
        node_id=record.node_id,
        error=error,
        image_digest=record.image_digest,
        cache_state=record.cache_state,
        dockerfile_path=record.dockerfile_path,
        target=record.target,
        platforms=record.platforms,
        vcs_branch=record.vcs_branch,
        vcs_revision=record.vcs_revision,
        group_id=record.group_id,
        repeat_of=record.repeat_of,
        repeated_by=record.repeated_by,
        image_saved=record.image_saved,
        client=record.client,
    )
    message.created_at.FromDatetime(record.created_at)
    if record.started_at is not None:
        message.started_at.FromDatetime(record.started_at)
    if record.completed_at is not None:
        message.completed_at.FromDatetime(record.completed_at)
    if record.stats:
        message.stats.ParseFromString(record.stats)
    if record.identity:
        message.identity.ParseFromString(record.identity)
    if record.network_policy:
        message.network_policy.ParseFromString(record.network_policy)
        message.network_policy.ClearField("text")
    return message


def without_text(network_policy: bytes) -> bytes:
    """Return a serialised NetworkPolicy as records keep it of builds that are over."""
    message = builds_pb.NetworkPolicy.FromString(network_policy)
    message.ClearField("text")
    return message.SerializeToString()


def _build(row: sa.Row[Any]) -> BuildRecord:
    values = dict(row._mapping)
    # Builds that an older version wrote have none of these.
    values["client"] = row.client or ""
    values["vcs_target_branch"] = row.vcs_target_branch or ""
    values["repeat_of"] = row.repeat_of or ""
    values["repeated_by"] = row.repeated_by or ""
    values["image_saved"] = bool(row.image_saved)
    values["cache_choice"] = row.cache_choice or b""
    values["group_id"] = row.group_id or ""
    values["preferred_platform"] = row.preferred_platform or ""
    values["identity"] = row.identity or b""
    values["network_policy"] = row.network_policy or b""
    values["devices"] = tuple(row.devices or ())
    return BuildRecord(**values | {"platforms": tuple(row.platforms)})


def _page_token(record: BuildRecord) -> str:
    microseconds = int(record.created_at.timestamp()) * 1_000_000 + record.created_at.microsecond
    return f"{microseconds}-{record.build_id}"


def _parse_page_token(token: str) -> tuple[datetime, str]:
    match = _PAGE_TOKEN.fullmatch(token)
    if match is None:
        raise UsageError("the page token is not from a former response")
    try:
        return schema.EPOCH + timedelta(microseconds=int(match[1])), match[2]
    except OverflowError as error:
        raise UsageError("the page token is not from a former response") from error

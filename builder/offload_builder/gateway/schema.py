"""The gateway's tables. SQLAlchemy Core only, portable between SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

SCHEMA_VERSION = 5
"""Older databases get the columns that they lack; newer ones are refused."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Instant(sa.types.TypeDecorator[datetime]):
    """A UTC time as whole microseconds since 1970: exact, sortable, equal on every database."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:  # noqa: ARG002
        """Return the column's value."""
        return None if value is None else (value - EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """Return the time."""
        return None if value is None else EPOCH + timedelta(microseconds=value)


metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String(40), primary_key=True),
    sa.Column("value", sa.String(200), nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("token_id", sa.String(12), primary_key=True),
    sa.Column("secret_hash", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("project_ids", sa.JSON, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant),
    sa.Column("last_used_at", Instant),
    sa.Column("revoked_at", Instant),
    # How many nodes it may enrol; none for any number, which older tokens have.
    sa.Column("max_uses", sa.Integer),
)

# A node that a token has enrolled: its certificates name this id.
node_enrolments = sa.Table(
    "node_enrolments",
    metadata,
    sa.Column("enrolment_id", sa.String(12), primary_key=True),
    sa.Column("token_id", sa.String(12), nullable=False),
    sa.Column("node_id", sa.String(40), nullable=False),
    # SHA-256 of the node's public key: one whose answer was lost may ask again.
    sa.Column("key_hash", sa.String(64), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("renewed_at", Instant),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Column("last_used_at", Instant),
    sa.Column("revoked_at", Instant),
    sa.Index("node_enrolments_by_token", "token_id"),
)

# Logins with tokens of identity providers; a token of theirs is known by its use_key.
external_logins = sa.Table(
    "external_logins",
    metadata,
    sa.Column("token_id", sa.String(12), primary_key=True),
    sa.Column("use_key", sa.String(64), nullable=False, unique=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("project_ids", sa.JSON, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Column("last_used_at", Instant),
    sa.Column("revoked_at", Instant),
    sa.Column("token_expires_at", Instant, nullable=False),
    # A serialised ExternalIdentity.
    sa.Column("identity", sa.LargeBinary, nullable=False),
)

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("project_id", sa.String(40), primary_key=True),
    sa.Column("created_at", Instant, nullable=False),
)

# Tables of their own, so that a database of before gets them when it is opened. A bound of 0 is
# none of the project's own.
project_bounds = sa.Table(
    "project_bounds",
    metadata,
    sa.Column("project_id", sa.String(40), primary_key=True),
    sa.Column("shared_keep_bytes", sa.BigInteger, nullable=False),
    sa.Column("shared_idle_seconds", sa.BigInteger, nullable=False),
    sa.Column("node_keep_bytes", sa.BigInteger, nullable=False),
)

# Every version of the egress policy of the pool, whose scope is empty, and of projects. Rows are
# only ever added; the newest of a scope holds.
egress_policies = sa.Table(
    "egress_policies",
    metadata,
    sa.Column("scope", sa.String(40), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("file", sa.String(200), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("author", sa.String(64), nullable=False),
    sa.Column("applied_at", Instant, nullable=False),
    sa.Column("note", sa.String(300), nullable=False),
)

# Which egress policies the attached nodes have in force; the row without a name is the gateway's.
egress_nodes = sa.Table(
    "egress_nodes",
    metadata,
    sa.Column("node_id", sa.String(64), primary_key=True),
    sa.Column("versions", sa.Text, nullable=False),
    sa.Column("problem", sa.Text, nullable=False),
    sa.Column("told_at", Instant, nullable=False),
)

# How long steps took when they last ran, for what a cache hit saves.
step_times = sa.Table(
    "step_times",
    metadata,
    sa.Column("project_id", sa.String(40), primary_key=True),
    sa.Column("step_key", sa.String(32), primary_key=True),
    sa.Column("milliseconds", sa.BigInteger, nullable=False),
    sa.Column("ran_at", Instant, nullable=False),
    sa.Index("step_times_by_age", "project_id", "ran_at"),
)

builds = sa.Table(
    "builds",
    metadata,
    sa.Column("build_id", sa.String(12), primary_key=True),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=False),
    sa.Column("member", sa.String(64), nullable=False),
    sa.Column("token_id", sa.String(12), nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("state", sa.Integer, nullable=False),
    sa.Column("node_id", sa.String(40), nullable=False, default=""),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("started_at", Instant),
    sa.Column("completed_at", Instant),
    sa.Column("error", sa.Text, nullable=False, default=""),
    # A serialised BuildStats: new numbers need no new column.
    sa.Column("stats", sa.LargeBinary, nullable=False, default=b""),
    sa.Column("image_digest", sa.String(80), nullable=False, default=""),
    sa.Column("cache_state", sa.Integer, nullable=False, default=0),
    sa.Column("dockerfile_path", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("platforms", sa.JSON, nullable=False),
    sa.Column("vcs_branch", sa.Text, nullable=False),
    sa.Column("vcs_revision", sa.Text, nullable=False),
    sa.Column("vcs_target_branch", sa.Text),
    # A serialised CacheChoice.
    sa.Column("cache_choice", sa.LargeBinary),
    sa.Column("group_id", sa.String(64)),
    sa.Column("preferred_platform", sa.String(64)),
    # The lost build that this one repeats, and the one that repeats this.
    sa.Column("repeat_of", sa.String(12)),
    sa.Column("repeated_by", sa.String(12)),
    sa.Column("image_saved", sa.Boolean),
    # A serialised ExternalIdentity.
    sa.Column("identity", sa.LargeBinary),
    sa.Column("client", sa.String(40)),
    # A serialised NetworkPolicy; without its text when the build is over.
    sa.Column("network_policy", sa.LargeBinary),
    sa.Column("devices", sa.JSON),
    # A request of one token is one build, also when it is repeated after a restart.
    sa.UniqueConstraint("token_id", "request_id", name="one_build_per_request"),
    sa.Index("builds_by_time", "created_at", "build_id"),
    sa.Index("builds_by_project", "project_id", "created_at", "build_id"),
    sa.Index("builds_by_state", "state"),
)

build_logs = sa.Table(
    "build_logs",
    metadata,
    sa.Column("build_id", sa.String(12), primary_key=True),
    sa.Column("first_sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    # Bytes of the batches before compression; they count against the limit of a build.
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    # zstd frame of a serialised LogsResponse.
    sa.Column("batches", sa.LargeBinary, nullable=False),
)

# Docker engines of members on nodes. A table of its own, so that a database of before gets it.
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("session_id", sa.String(16), primary_key=True),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=False),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("token_id", sa.String(12), nullable=False),
    sa.Column("role", sa.Integer, nullable=False),
    sa.Column("name", sa.String(40), nullable=False),
    sa.Column("state", sa.Integer, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    # A serialised SessionSpec.
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("trust_domain", sa.String(80), nullable=False),
    sa.Column("shared_with", sa.JSON, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("node_id", sa.String(40), nullable=False),
    sa.Column("ready_at", Instant),
    sa.Column("ended_at", Instant),
    # A serialised SessionLimits, and a SessionActivity.
    sa.Column("limits", sa.LargeBinary, nullable=False),
    sa.Column("activity", sa.LargeBinary, nullable=False),
    sa.Column("devices", sa.JSON, nullable=False),
    sa.Column("engine_version", sa.String(40), nullable=False),
    sa.Column("used_milliseconds", sa.BigInteger, nullable=False),
    # The rate when it began, so that a new one changes no bill of before.
    sa.Column("currency", sa.String(12), nullable=False),
    sa.Column("micros_per_hour", sa.BigInteger, nullable=False),
    sa.Column("stop_reason", sa.Text, nullable=False),
    sa.UniqueConstraint("token_id", "request_id", name="one_session_per_request"),
    sa.Index("sessions_by_time", "created_at", "session_id"),
    sa.Index("sessions_by_state", "state"),
)

# Who has done what. Rows are only ever added, and the oldest removed.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column(
        "number",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("at", Instant, nullable=False),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("member", sa.String(64), nullable=False),
    sa.Column("role", sa.String(12), nullable=False),
    sa.Column("token_id", sa.String(12), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=False),
    sa.Column("build_id", sa.String(12), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("result", sa.String(40), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("secret_ids", sa.JSON, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Index("audit_by_time", "at"),
    # Numbers of removed rows do not come again.
    sqlite_autoincrement=True,
)

sa.event.listen(
    audit,
    "after_create",
    sa.DDL(  # type: ignore[no-untyped-call]
        "CREATE TRIGGER audit_is_append_only BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'records of the audit log are not changed'); END"
    ).execute_if(dialect="sqlite"),
)
for _statement in (
    (
        "CREATE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'records of the audit log are not changed'; END$$"
    ),
    (
        "CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change()"
    ),
):
    sa.event.listen(
        audit,
        "after_create",
        sa.DDL(_statement).execute_if(dialect="postgresql"),  # type: ignore[no-untyped-call]
    )


def add_missing_columns(connection: sa.Connection) -> None:
    """Bring the tables of an older version up to date: columns are only ever added.

    A column that comes later must be nullable, so that rows which are there already have a value.
    """
    inspector = sa.inspect(connection)
    prepare = connection.dialect.identifier_preparer
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                kind = column.type.compile(connection.dialect)
                name = prepare.format_table(table), prepare.format_column(column)
                connection.exec_driver_sql(f"ALTER TABLE {name[0]} ADD COLUMN {name[1]} {kind}")

"""The gateway's database: one dedicated thread, one connection, short transactions.

Calls are handed to the thread in the order in which they are made, also when nobody awaits them.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import sqlalchemy as sa
import structlog

from offload_builder.gateway import schema
from offload_core.errors import ConfigError, InternalError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

log = structlog.get_logger(__name__)

BUSY_TIMEOUT_SECONDS = 10
"""How long a write waits for another process, for example `offload-builder token create`."""

_WRITES = "offload_writes"


def default_url(data_dir: Path) -> str:
    """Return the URL of the SQLite file in a data directory."""
    return f"sqlite:///{(data_dir / 'gateway.sqlite').resolve()}"


class Store:
    """The database behind an async interface; use as an async context manager."""

    def __init__(self, url: str) -> None:
        """Remember the SQLAlchemy URL; nothing is opened yet."""
        self._url = url
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gateway-store")
        self._engine: sa.Engine | None = None

    async def __aenter__(self) -> Self:
        """Open the database and create what is missing.

        Raises:
            ConfigError: it cannot be opened, or is of a newer version.
        """
        try:
            await self._submit(self._open)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Finish what was handed over and close."""
        await self._submit(self._close)
        self._executor.shutdown(wait=False)

    def read(self, work: Callable[[sa.Connection], T]) -> asyncio.Future[T]:
        """Run `work` in the store's thread with a snapshot of the database."""
        return self._submit(self._transaction, work, False)

    def write(self, work: Callable[[sa.Connection], T]) -> asyncio.Future[T]:
        """Run `work` in the store's thread as one transaction."""
        return self._submit(self._transaction, work, True)

    def post(self, work: Callable[[sa.Connection], object]) -> None:
        """Do as `write`, without a waiter; a failure is logged."""
        self.write(work).add_done_callback(_log_failure)

    def _submit(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _transaction(self, work: Callable[[sa.Connection], T], writes: bool) -> T:
        if self._engine is None:
            raise InternalError("the gateway's database is closed")
        try:
            with self._engine.connect() as connection:
                connection.execution_options(**{_WRITES: writes})
                with connection.begin():
                    return work(connection)
        except OffloadError:
            raise
        except sa.exc.IntegrityError:
            # Callers tell a duplicate from a fault.
            raise
        except sa.exc.SQLAlchemyError as error:
            log.error("store.failed", exc_info=error)
            raise InternalError(
                "the gateway's database failed; its log says more",
                hint="ask your administrator to check the gateway's disk",
            ) from error

    def _open(self) -> None:
        try:
            self._engine = _make_engine(self._url)
            with self._engine.begin() as connection:
                _check_version(connection)
        except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
            if self._engine is not None:
                self._engine.dispose()
            # The driver's own text; the whole error would repeat the URL with its password.
            text = getattr(error, "orig", None) or error
            raise ConfigError(f"cannot open the gateway's database: {text}") from error

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None


def _check_version(connection: sa.Connection) -> None:
    # First: a database of a newer version stays as it is.
    schema.meta.create(connection, checkfirst=True)
    key = schema.meta.c.key == "schema_version"
    found = connection.scalar(sa.select(schema.meta.c.value).where(key))
    if found is not None and int(found) > schema.SCHEMA_VERSION:
        raise ConfigError(
            f"the gateway's database has version {found}, this program works with version "
            f"{schema.SCHEMA_VERSION}; install the offload-build that wrote it"
        )
    schema.metadata.create_all(connection)
    version = {"value": str(schema.SCHEMA_VERSION)}
    if found is None:
        connection.execute(schema.meta.insert(), {"key": "schema_version", **version})
    elif int(found) < schema.SCHEMA_VERSION:
        schema.add_missing_columns(connection)
        connection.execute(schema.meta.update().where(key).values(**version))
        log.info("store.upgraded", from_version=int(found), to_version=schema.SCHEMA_VERSION)


def _make_engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(parsed, pool_size=1, max_overflow=0, pool_pre_ping=True)
    if parsed.database:
        path = Path(parsed.database)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its side files the mode of the database.
        path.touch(mode=0o600)
    engine = sa.create_engine(
        parsed,
        # One connection for one thread; an in-memory database lives as long as its connection.
        poolclass=sa.pool.StaticPool,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # We begin transactions ourselves, see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    # WAL with synchronous=NORMAL: readers never wait, a power cut may lose the last moments but
    # never the consistency (sqlite.org/pragma.html#pragma_synchronous).
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that begins as a reader and then writes fails at once when another process
    # wrote in between, without waiting for the busy timeout.
    writes = connection.get_execution_options().get(_WRITES, True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _log_failure(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("store.write.failed", exc_info=error)

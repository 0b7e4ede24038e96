"""The shared store in an S3 bucket (AWS, MinIO and others), through the minio client.

The client is synchronous: it runs in two small thread pools, one for what builds wait for and one
for uploads, so that a slow upload never delays a read. The HTTP pools are as large as the thread
pools, because urllib3 throws surplus connections away.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import urllib3
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, S3Error

from offload_cache.circuits import Verb
from offload_cache.health import StoreHealth
from offload_cache.objectstore import ObjectInfo, SinkGate
from offload_cache.s3calls import StoreCalls
from offload_cache.s3client import S3Client, encryption_of, make_pool
from offload_cache.s3config import S3Config
from offload_cache.s3create import SETTLE_SECONDS, ObjectCreator
from offload_cache.s3credentials import make_provider
from offload_cache.s3failures import (
    DENIED,
    MISSING,
    NO_SUCH_FEATURE,
    NOTHING_THERE,
    NotRemovedError,
)
from offload_cache.statistics import CacheStatistics
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["S3Config", "S3Store"]

T = TypeVar("T")

_PIECE_BYTES = 256 << 10
_PART_BYTES = 8 << 20
_PARALLEL_PARTS = 2
_DELETED_AT_ONCE = 1_000  # Amazon S3 API reference, DeleteObjects
_LISTED_AT_ONCE = 1_000  # Amazon S3 API reference, ListObjectsV2
_SLOWEST_BYTES_PER_SECOND = 128 << 10
_PROBE_BYTES = 64 << 10
_BUCKET_EXISTS = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}


class _Response(Protocol):
    """What is used of urllib3's response."""

    def read1(self, amt: int, decode_content: bool) -> bytes | None: ...
    def close(self) -> None: ...
    def release_conn(self) -> None: ...


class S3Store:
    """ObjectStore in one bucket.

    What a build waits for fails after `S3Config.read_seconds` without a byte, and then the circuit
    of the reads opens: all reads that are stuck end at once, and none is tried until a probe in
    the background found the store well again. Uploads have the patience of
    `S3Config.write_seconds` and a circuit of their own.

    Args:
        config: the bucket.
        health: bounds of the circuits; its name is shown to people.
        statistics: counters to use.
        readers: parallel requests that builds wait for.
        writers: parallel uploads.
        settle_seconds: how long a creation waits where the store has no conditional writes.
    """

    def __init__(
        self,
        config: S3Config,
        *,
        health: StoreHealth | None = None,
        statistics: CacheStatistics | None = None,
        readers: int = 8,
        writers: int = 4,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._config = config
        self._prefix = config.prefix.strip("/") + "/" if config.prefix.strip("/") else ""
        self._statistics = statistics or CacheStatistics()
        self._calls = StoreCalls(
            config.endpoint_url,
            health or StoreHealth(config.endpoint_url),
            self._statistics,
            readers=readers,
            writers=writers,
            probe_seconds=config.read_seconds * 2,
        )
        provider = make_provider(config)
        # While a body is sent, urllib3 has the connect timeout on the socket, and Python applies
        # it to the whole body: for uploads it must suit one part on a slow line.
        patience, haste = config.write_seconds, config.read_seconds
        self._pools = (
            make_pool(
                config, readers, connect_seconds=config.connect_seconds, read_seconds=haste
            ),
            make_pool(
                config, writers * _PARALLEL_PARTS, connect_seconds=patience, read_seconds=patience
            ),
            # A creation that is repeated after a lost answer would meet its own object.
            make_pool(
                config, writers, connect_seconds=patience, read_seconds=patience, attempts=1
            ),
        )  # fmt: skip
        self._reading, self._writing, creating = (
            S3Client(config, provider, pool) for pool in self._pools
        )
        self._encryption = encryption_of(config)
        self._creator = ObjectCreator(
            creating, config.bucket, self._encryption, settle_seconds=settle_seconds
        )
        self._settle_seconds = settle_seconds
        self._deletes_many = True
        self._bucket_lock = threading.Lock()
        self._bucket_ready = False

    @property
    def reachable(self) -> bool:
        """See ObjectStore."""
        return self._calls.circuits.reachable

    @property
    def state(self) -> str:
        """See ObjectStore."""
        return self._calls.circuits.state

    # -- reading

    async def read(
        self,
        key: str,
        sink: Callable[[bytes], None],
        *,
        offset: int = 0,
        length: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """See ObjectStore."""
        gate = SinkGate(sink)
        try:
            # The thread watches the rate itself, whatever the size turns out to be.
            total = await self._calls.run(
                Verb.GET,
                lambda: self._read(key, gate, offset, length),
                timeout,
                gate=gate,
                probe=lambda: self._read(
                    key, SinkGate(lambda _: None), offset, min(length or _PROBE_BYTES, _PROBE_BYTES)
                ),
            )
        finally:
            gate.shut()
        if gate.sink_error is not None:
            raise gate.sink_error
        self._statistics.shared_reads += 1
        self._statistics.shared_bytes_read += total
        return total

    def _read(self, key: str, gate: SinkGate, offset: int, length: int | None) -> int:
        """Pass an object to a gate; a connection that breaks is continued once where it broke."""
        total = 0
        started = time.monotonic()
        for is_last in (False, True):
            left = 0 if length is None else length - total
            with self._denied_or_absent(key):
                response = self._reading.get_object(
                    self._config.bucket, self._prefix + key, offset=offset + total, length=left
                )
            try:
                for piece in self._pieces(response, total, started):
                    total += len(piece)
                    gate.push(piece)
                    if gate.sink_error is not None:
                        return total
            except (urllib3.exceptions.ProtocolError, ConnectionError):
                if total == length:
                    return total  # it broke after the last byte; "0 more" would mean all more
                if is_last or not total:
                    raise
            else:
                return total
        return total

    def _pieces(self, response: _Response, total: int, started: float) -> Iterator[bytes]:
        try:
            while piece := response.read1(_PIECE_BYTES, decode_content=False):
                yield piece
                total += len(piece)
                allowed = self._config.read_seconds + total / _SLOWEST_BYTES_PER_SECOND
                if time.monotonic() - started > allowed:
                    raise TimeoutError("the store sends too slowly")
        finally:
            response.close()
            response.release_conn()

    def _denied_or_absent(self, key: str) -> _DeniedOrAbsent:
        return _DeniedOrAbsent(key, lambda: self._is_listed(key))

    def _is_listed(self, key: str) -> bool:
        full = self._prefix + key
        listed = self._reading.list_objects(self._config.bucket, prefix=full, recursive=True)
        return any(item.object_name == full for item in _first(listed, 1))

    async def read_bytes(self, key: str, *, max_bytes: int, timeout: float | None = None) -> bytes:
        """See ObjectStore."""
        parts: list[bytes] = []
        size = 0

        def collect(piece: bytes) -> None:
            nonlocal size
            size += len(piece)
            if size > max_bytes:
                raise NotFoundError(f"object {key} has more than {max_bytes} bytes")
            parts.append(piece)

        await self.read(key, collect, timeout=timeout)
        return b"".join(parts)

    async def stat(self, key: str, *, timeout: float | None = None) -> ObjectInfo | None:
        """See ObjectStore."""

        def work() -> ObjectInfo | None:
            try:
                with self._denied_or_absent(key):
                    found = self._reading.stat_object(self._config.bucket, self._prefix + key)
            except NotFoundError:
                return None
            return ObjectInfo(key, found.size or 0, found.last_modified or datetime.now(UTC))

        return await self._calls.run(Verb.HEAD, work, timeout, probe=work)

    async def list_objects(
        self, prefix: str, *, limit: int, start_after: str = "", timeout: float | None = None
    ) -> list[ObjectInfo]:
        """See ObjectStore."""

        def work(limit: int = limit) -> list[ObjectInfo]:
            return [
                ObjectInfo(
                    (item.object_name or "").removeprefix(self._prefix),
                    item.size or 0,
                    item.last_modified or datetime.now(UTC),
                )
                for item in _first(
                    self._listed(prefix, recursive=True, start_after=start_after), limit
                )
            ]

        # Each page has the patience of one answer.
        pages = 1 + limit // _LISTED_AT_ONCE
        bound = timeout or self._config.read_seconds * (1 + pages)
        return await self._calls.run(Verb.LIST, work, bound, probe=lambda: work(1))

    async def list_folders(self, prefix: str) -> list[str]:
        """See ObjectStore."""

        def work() -> list[str]:
            listed = self._listed(prefix, recursive=False)
            return sorted(
                (item.object_name or "").removeprefix(self._prefix)
                for item in listed
                if item.is_dir
            )

        return await self._calls.run(Verb.LIST, work, None, probe=work)

    def _listed(self, prefix: str, *, recursive: bool, start_after: str = "") -> Iterator[Any]:
        try:
            yield from self._reading.list_objects(
                self._config.bucket,
                prefix=self._prefix + prefix,
                recursive=recursive,
                start_after=self._prefix + start_after if start_after else None,
            )
        except S3Error as error:
            if error.code not in MISSING:
                raise

    # -- writing

    async def write_file(self, key: str, path: Path) -> int:
        """See ObjectStore."""
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {path}") from error

        def work() -> int:
            self._ensure_bucket()
            try:
                file = path.open("rb")
            except FileNotFoundError as error:
                raise NotFoundError(f"there is no file {path}") from error
            with file:
                self._writing.put_object(
                    self._config.bucket,
                    self._prefix + key,
                    file,
                    size,
                    sse=self._encryption,
                    part_size=_PART_BYTES,
                    num_parallel_uploads=_PARALLEL_PARTS,
                )
            return size

        await self._calls.run(Verb.PUT, work, self._write_bound(size))
        self._count_write(size)
        return size

    async def write_bytes(self, key: str, data: bytes) -> None:
        """See ObjectStore."""

        def work() -> None:
            self._ensure_bucket()
            self._writing.put_object(
                self._config.bucket,
                self._prefix + key,
                BytesIO(data),
                len(data),
                sse=self._encryption,
            )

        await self._calls.run(Verb.PUT, work, self._write_bound(len(data)))
        self._count_write(len(data))

    async def create_bytes(self, key: str, data: bytes) -> bool:
        """See ObjectStore and `s3create`."""

        def work() -> bool:
            self._ensure_bucket()
            return self._creator.create(self._prefix + key, data)

        bound = self._write_bound(len(data)) + self._settle_seconds
        created = await self._calls.run(Verb.PUT, work, bound)
        if created:
            self._count_write(len(data))
        return created

    def _write_bound(self, size: int) -> float:
        return self._config.write_seconds * 4 + size / _SLOWEST_BYTES_PER_SECOND

    def _count_write(self, size: int) -> None:
        self._statistics.shared_writes += 1
        self._statistics.shared_bytes_written += size

    def _ensure_bucket(self) -> None:
        with self._bucket_lock:
            if self._bucket_ready:
                return
            try:
                if not self._writing.bucket_exists(self._config.bucket):
                    self._writing.make_bucket(self._config.bucket, self._config.region)
            except S3Error as error:
                # A key that may only use its prefix may not look at the bucket; the write tells.
                if error.code not in _BUCKET_EXISTS and error.code not in DENIED:
                    raise
            self._bucket_ready = True

    # -- deleting

    async def delete(self, key: str) -> None:
        """See ObjectStore."""

        def work() -> None:
            try:
                self._writing.remove_object(self._config.bucket, self._prefix + key)
            except S3Error as error:
                if error.code not in MISSING:
                    raise

        await self._calls.run(Verb.DELETE, work, self._config.write_seconds * 2)

    async def delete_many(self, keys: Sequence[str]) -> None:
        """See ObjectStore."""
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            chunk = keys[start : start + _DELETED_AT_ONCE]
            if self._deletes_many and await self._delete_chunk(chunk):
                continue
            self._deletes_many = False
            for key in chunk:
                await self.delete(key)

    async def _delete_chunk(self, keys: Sequence[str]) -> bool:
        """Remove up to 1,000 objects; False when the store cannot do that in one request."""
        objects = [DeleteObject(self._prefix + key) for key in keys]

        def work() -> bool:
            try:
                for failure in self._writing.remove_objects(self._config.bucket, objects):
                    if failure.code in NO_SUCH_FEATURE:
                        return False
                    if failure.code not in MISSING:
                        raise NotRemovedError(failure.code or "")
            except InvalidResponseError:
                return False  # an answer that is no XML: the store does not know the request
            except S3Error as error:
                if error.code in NO_SUCH_FEATURE:
                    return False
                if error.code not in MISSING:
                    raise
            return True

        return await self._calls.run(Verb.DELETE, work, self._config.write_seconds * 2)

    async def close(self) -> None:
        """See ObjectStore."""
        await self._calls.close()
        for pool in self._pools:
            pool.cut()


class _DeniedOrAbsent:
    """Turns a client's error into NotFoundError when there is no such object.

    AWS answers "403" for an absent object to those who may list only below a prefix: Amazon S3 API
    reference, GetObject, "Permissions". A listing below the prefix tells the two apart.
    """

    def __init__(self, key: str, is_listed: Callable[[], bool]) -> None:
        self._key = key
        self._is_listed = is_listed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, S3Error):
            return
        absent = error.code in NOTHING_THERE
        if not absent and error.code in DENIED:
            absent = not self._is_listed()
        if absent:
            raise NotFoundError(f"there is no object {self._key}") from error


def _first(found: Iterator[T], limit: int) -> Iterator[T]:
    for number, item in enumerate(found):
        if number >= limit:
            return
        yield item

"""The shared store in an S3 bucket (AWS, MinIO and others), through the minio client.

The client is synchronous: it runs in two small thread pools, one for what builds wait for and one
for uploads, so that a slow upload never delays a read. The HTTP pools are as large as the thread
pools, because urllib3 throws surplus connections away.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from offload_cache.health import StoreHealth
from offload_cache.objectstore import ObjectInfo, SinkGate
from offload_cache.statistics import CacheStatistics
from offload_core.errors import CacheUnavailableError, ConfigError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

T = TypeVar("T")

_PIECE_BYTES = 1 << 20
_PART_BYTES = 8 << 20
_PARALLEL_PARTS = 2
_SLOWEST_BYTES_PER_SECOND = 128 << 10
_MISSING = {"NoSuchKey", "NoSuchBucket", "ResourceNotFound", "NoSuchObject"}
_NOTHING_THERE = {*_MISSING, "InvalidRange"}
_BUCKET_EXISTS = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}


@dataclass(frozen=True, slots=True)
class S3Config:
    """Where the bucket is and who we are.

    Attributes:
        endpoint_url: "https://s3.eu-central-1.amazonaws.com" or "http://127.0.0.1:9000".
        bucket: created when it does not exist and we may.
        access_key: name of the key.
        secret_key: never printed.
        region: given to the signature; "us-east-1" suits MinIO.
        prefix: of all keys, for several pools in one bucket.
        connect_seconds: longest wait for a connection.
        read_seconds: longest wait for the next bytes, and for any small answer.
    """

    endpoint_url: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = "us-east-1"
    prefix: str = ""
    connect_seconds: float = 3.0
    read_seconds: float = 30.0

    def __post_init__(self) -> None:
        url = urlsplit(self.endpoint_url)
        if url.scheme not in {"http", "https"} or not url.hostname or url.path.strip("/"):
            raise ConfigError(
                "the S3 endpoint is no URL of the form https://HOST[:PORT] without a path"
            )
        if url.username is not None or url.password is not None:
            raise ConfigError(
                "the S3 endpoint must not hold credentials; set the keys on their own"
            )


class _Retry(urllib3.Retry):
    """Repeats what a dropped connection or a 5xx ended, but never what was merely slow."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


class _Response(Protocol):
    """What is used of urllib3's response."""

    headers: Any

    def stream(self, amt: int, decode_content: bool) -> Any: ...
    def close(self) -> None: ...
    def release_conn(self) -> None: ...


class S3Store:
    """ObjectStore in one bucket."""

    def __init__(
        self,
        config: S3Config,
        *,
        health: StoreHealth | None = None,
        statistics: CacheStatistics | None = None,
        readers: int = 8,
        writers: int = 4,
    ) -> None:
        self._config = config
        self._prefix = config.prefix.strip("/") + "/" if config.prefix.strip("/") else ""
        self._health = health or StoreHealth(config.endpoint_url)
        self._statistics = statistics or CacheStatistics()
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="s3-read")
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="s3-write")
        self._pools = (
            self._pool(readers, config.connect_seconds),
            # While a body is sent, urllib3 has the connect timeout on the socket, and Python
            # applies it to the whole body: it must suit one part on a slow line.
            self._pool(writers * _PARALLEL_PARTS, config.read_seconds),
        )
        self._reading, self._writing = (self._client(pool) for pool in self._pools)
        # Its warnings about each retry repeat what the health line says, with long URLs.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._bucket_lock = threading.Lock()
        self._bucket_ready = False

    def _pool(self, size: int, connect_seconds: float) -> urllib3.PoolManager:
        return urllib3.PoolManager(
            maxsize=size,
            timeout=urllib3.Timeout(connect=connect_seconds, read=self._config.read_seconds),
            retries=_Retry(
                total=2,
                connect=1,
                backoff_factor=0.2,
                status_forcelist=(500, 502, 503, 504),
                raise_on_status=True,
            ),
        )

    def _client(self, pool: urllib3.PoolManager) -> Minio:
        url = urlsplit(self._config.endpoint_url)
        return Minio(
            url.netloc,
            access_key=self._config.access_key,
            secret_key=self._config.secret_key,
            secure=url.scheme == "https",
            region=self._config.region,
            http_client=pool,
        )

    @property
    def reachable(self) -> bool:
        """See ObjectStore."""
        return self._health.reachable

    @property
    def state(self) -> str:
        """See ObjectStore."""
        return self._health.state

    async def _call(
        self, executor: ThreadPoolExecutor, work: Callable[[], T], deadline_seconds: float | None
    ) -> T:
        self._health.check()
        loop = asyncio.get_running_loop()
        begun = threading.Event()

        def begin() -> T:
            begun.set()
            return work()

        try:
            async with asyncio.timeout(deadline_seconds):
                result = await loop.run_in_executor(executor, begin)
        except NotFoundError:
            self._health.succeeded()  # "not there" is an answer
            raise
        except asyncio.CancelledError:
            self._health.abandoned()
            raise
        except TimeoutError as error:
            if not begun.is_set():
                # It waited for a thread of ours; that says nothing about the store.
                self._health.abandoned()
                raise CacheUnavailableError("too many transfers are under way") from error
            cause = str(error) or f"no answer in {deadline_seconds or 0:.1f} s"
            raise self._failure(cause, weight=2) from error
        except (MinioException, urllib3.exceptions.HTTPError) as error:
            raise self._failure(_cause(error)) from error
        except OSError as error:
            raise self._failure(str(error)) from error
        self._health.succeeded()
        return result

    def _failure(self, cause: str, *, weight: int = 1) -> CacheUnavailableError:
        self._health.failed(cause, weight=weight)
        self._statistics.shared_failures += 1
        return CacheUnavailableError(
            f"the shared cache at {self._config.endpoint_url} failed: {cause}"
        )

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

        def work() -> int:
            try:
                response = self._reading.get_object(
                    self._config.bucket, self._prefix + key, offset=offset, length=length or 0
                )
            except S3Error as error:
                raise _missing(error, key) from error
            return self._drain(response, gate)

        try:
            # The thread watches the rate itself, whatever the size turns out to be.
            total = await self._call(self._readers, work, timeout)
        finally:
            gate.shut()
        self._statistics.shared_reads += 1
        self._statistics.shared_bytes_read += total
        return total

    def _drain(self, response: _Response, gate: SinkGate) -> int:
        total = 0
        started = time.monotonic()
        try:
            for piece in response.stream(_PIECE_BYTES, decode_content=False):
                gate.push(piece)
                total += len(piece)
                allowed = self._config.read_seconds + total / _SLOWEST_BYTES_PER_SECOND
                if time.monotonic() - started > allowed:
                    raise TimeoutError("the store sends too slowly")
        finally:
            response.close()
            response.release_conn()
        return total

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

        await self.read(key, collect, timeout=timeout or self._config.read_seconds)
        return b"".join(parts)

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
                    part_size=_PART_BYTES,
                    num_parallel_uploads=_PARALLEL_PARTS,
                )
            return size

        await self._call(self._writers, work, self._write_bound(size))
        self._count_write(size)
        return size

    async def write_bytes(self, key: str, data: bytes) -> None:
        """See ObjectStore."""

        def work() -> None:
            self._ensure_bucket()
            self._writing.put_object(
                self._config.bucket, self._prefix + key, BytesIO(data), len(data)
            )

        await self._call(self._writers, work, self._write_bound(len(data)))
        self._count_write(len(data))

    def _write_bound(self, size: int) -> float:
        return self._config.read_seconds * 4 + size / _SLOWEST_BYTES_PER_SECOND

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
                # A key that may only write objects may not look at the bucket; the write tells.
                if error.code not in _BUCKET_EXISTS and error.code != "AccessDenied":
                    raise
            self._bucket_ready = True

    async def stat(self, key: str, *, timeout: float | None = None) -> ObjectInfo | None:
        """See ObjectStore."""

        def work() -> ObjectInfo | None:
            try:
                found = self._reading.stat_object(self._config.bucket, self._prefix + key)
            except S3Error as error:
                if error.code in _MISSING:
                    return None
                raise
            return ObjectInfo(key, found.size or 0, found.last_modified or datetime.now(UTC))

        return await self._call(self._readers, work, timeout or self._config.read_seconds)

    async def list_objects(
        self, prefix: str, *, limit: int, start_after: str = "", timeout: float | None = None
    ) -> list[ObjectInfo]:
        """See ObjectStore."""

        def work() -> list[ObjectInfo]:
            found: list[ObjectInfo] = []
            try:
                for item in self._reading.list_objects(
                    self._config.bucket,
                    prefix=self._prefix + prefix,
                    recursive=True,
                    start_after=self._prefix + start_after if start_after else None,
                ):
                    if len(found) >= limit:
                        break
                    found.append(
                        ObjectInfo(
                            (item.object_name or "").removeprefix(self._prefix),
                            item.size or 0,
                            item.last_modified or datetime.now(UTC),
                        )
                    )
            except S3Error as error:
                if error.code not in _MISSING:
                    raise
            return found

        return await self._call(self._readers, work, timeout or self._config.read_seconds)

    async def delete(self, key: str) -> None:
        """See ObjectStore."""

        def work() -> None:
            try:
                self._writing.remove_object(self._config.bucket, self._prefix + key)
            except S3Error as error:
                if error.code not in _MISSING:
                    raise

        await self._call(self._writers, work, self._config.read_seconds)

    async def close(self) -> None:
        """See ObjectStore."""
        for executor in (self._readers, self._writers):
            executor.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.clear()


def _missing(error: S3Error, key: str) -> Exception:
    return NotFoundError(f"there is no object {key}") if error.code in _NOTHING_THERE else error


def _cause(error: Exception) -> str:
    """Return a short cause for people, without the signed URL that some messages hold."""
    if isinstance(error, S3Error):
        if error.code in {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
            return f"access was refused ({error.code}); check the keys and their policy"
        return f"the store answered {error.code}"
    if isinstance(error, urllib3.exceptions.MaxRetryError):
        return _cause(error.reason) if error.reason else "too many failed attempts"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "no connection"
    return type(error).__name__

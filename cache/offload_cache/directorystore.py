"""An object store in a directory that the nodes share: one machine's disk, or NFS."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from offload_cache.health import StoreHealth
from offload_cache.objectstore import ObjectInfo, SinkGate
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_PIECE_BYTES = 1 << 20
_ANSWER_SECONDS = 30.0
_COPY_SECONDS = 900.0


class DirectoryObjectStore:
    """Objects as files below `root/objects`, written to `root/ingest` first and then renamed."""

    def __init__(self, root: Path, *, health: StoreHealth | None = None, workers: int = 4) -> None:
        self._objects = root / "objects"
        self._ingests = root / "ingest"
        self._health = health or StoreHealth(str(root))
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="directory-store")

    @property
    def reachable(self) -> bool:
        """See ObjectStore."""
        return self._health.reachable

    @property
    def state(self) -> str:
        """See ObjectStore."""
        return self._health.state

    async def _call(self, work: Callable[[], T], timeout: float | None = None) -> T:
        self._health.check()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout or _ANSWER_SECONDS):
                result = await loop.run_in_executor(self._executor, work)
        except asyncio.CancelledError:
            self._health.abandoned()
            raise
        except OSError as error:  # a TimeoutError, too: a network file system that hangs
            self._health.failed(str(error) or "no answer in time")
            raise CacheUnavailableError(f"the shared cache directory failed: {error}") from error
        self._health.succeeded()
        return result

    def _path(self, key: str) -> Path:
        pure = PurePosixPath(key)
        if not key or pure.is_absolute() or ".." in pure.parts:
            raise UsageError(f'"{key[:100]}" is no object key')
        return self._objects / pure

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
        path = self._path(key)
        gate = SinkGate(sink)

        def work() -> int:
            total = 0
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    while length is None or total < length:
                        left = _PIECE_BYTES if length is None else length - total
                        piece = file.read(min(_PIECE_BYTES, left))
                        if not piece:
                            break
                        gate.push(piece)
                        total += len(piece)
            except (FileNotFoundError, NotADirectoryError):
                raise NotFoundError(f"there is no object {key}") from None
            return total

        try:
            return await self._call(work, timeout or _COPY_SECONDS)
        finally:
            gate.shut()

    async def read_bytes(self, key: str, *, max_bytes: int, timeout: float | None = None) -> bytes:
        """See ObjectStore."""
        parts: list[bytes] = []
        if (
            await self.read(
                key, parts.append, length=max_bytes + 1, timeout=timeout or _ANSWER_SECONDS
            )
            > max_bytes
        ):
            raise NotFoundError(f"object {key} has more than {max_bytes} bytes")
        return b"".join(parts)

    async def write_file(self, key: str, path: Path) -> int:
        """See ObjectStore."""

        def pieces() -> Iterator[bytes]:
            try:
                with path.open("rb") as file:
                    while piece := file.read(_PIECE_BYTES):
                        yield piece
            except FileNotFoundError as error:
                raise NotFoundError(f"there is no file {path}") from error

        return await self._write(key, pieces())

    async def write_bytes(self, key: str, data: bytes) -> None:
        """See ObjectStore."""
        await self._write(key, iter([data]))

    async def _write(self, key: str, pieces: Iterator[bytes]) -> int:
        target = self._path(key)

        def work() -> int:
            self._ingests.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            ingest = self._ingests / uuid.uuid4().hex
            total = 0
            try:
                with ingest.open("xb") as file:
                    for piece in pieces:
                        file.write(piece)
                        total += len(piece)
                ingest.rename(target)
            finally:
                ingest.unlink(missing_ok=True)
            return total

        return await self._call(work, _COPY_SECONDS)

    async def stat(self, key: str, *, timeout: float | None = None) -> ObjectInfo | None:
        """See ObjectStore."""
        path = self._path(key)
        return await self._call(lambda: self._info(key, path), timeout)

    @staticmethod
    def _info(key: str, path: Path) -> ObjectInfo | None:
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    async def list_objects(
        self, prefix: str, *, limit: int, timeout: float | None = None
    ) -> list[ObjectInfo]:
        """See ObjectStore."""
        # Only whole folders are walked; the rest of the prefix is compared.
        folder = self._path(prefix.rpartition("/")[0] or ".")

        def work() -> list[ObjectInfo]:
            keys = sorted(
                key
                for path in folder.rglob("*")
                if path.is_file()
                and (key := path.relative_to(self._objects).as_posix()).startswith(prefix)
            )
            found = (self._info(key, self._objects / key) for key in keys)
            return list(islice((info for info in found if info is not None), limit))

        with contextlib.suppress(FileNotFoundError):
            return await self._call(work, timeout)
        return []

    async def delete(self, key: str) -> None:
        """See ObjectStore."""
        path = self._path(key)
        await self._call(lambda: path.unlink(missing_ok=True))

    async def close(self) -> None:
        """See ObjectStore."""
        self._executor.shutdown(wait=False, cancel_futures=True)

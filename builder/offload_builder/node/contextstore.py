"""Files of build contexts by content, one store per project.

A blob is stored under its SHA-256 after its bytes were verified; a digest alone gives no access
to another project's bytes, because each project has its own directory. Layout: `ROOT/ab/<hex>`.

A blob is written under its name at once and never synced: a file of its own for each write and a
rename cost half as much again for small files. A crash can therefore leave a blob that is too
short or, after a power cut, of wrong bytes. So a blob that was found and not written by this
build is verified when it is read; one that is damaged is removed and counts as missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import structlog

from offload_builder.node.faults import storage_error
from offload_core.errors import ContextChangedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

T = TypeVar("T")

log = structlog.get_logger(__name__)

TOUCH_SECONDS = 3600.0
"""How stale a file's access mark may be; a write per use would cost more than it tells."""
TRIM_SHARE = 0.1
"""The bound is enforced each time that so much of it was added."""
READ_THREADS = 2
MAX_BLOB_BYTES = 12 << 20
"""The largest blob is the chunk list of a very large file."""
ANY_SIZE = -1
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC


class ContextStore:
    """Content-addressed files below one directory.

    Methods with `_sync` in their name block. They run in the store's own thread, one after the
    other: many small files are faster in one thread than handed over one by one, and nobody sees
    a blob that is half written. `read_sync` may run in any thread.
    """

    def __init__(self, root: Path, *, keep_bytes: int) -> None:
        self._root = root
        self._keep_bytes = keep_bytes
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-store")
        self._readers = ThreadPoolExecutor(
            max_workers=READ_THREADS, thread_name_prefix="context-read"
        )
        self._leased: dict[bytes, int] = {}
        self._added_bytes = 0

    async def __aenter__(self) -> Self:
        """Open the store.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the directory cannot be used.
        """
        try:
            await self.run(self._open_sync)
        except OSError as error:
            self._executor.shutdown(wait=False)
            self._readers.shutdown(wait=False)
            raise storage_error("store build contexts", error) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a `_sync` method in the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )

    async def run_reading(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that only reads in one of the threads for that."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    def path(self, sha256: bytes) -> str:
        """Return where a blob is or would be."""
        name = sha256.hex()
        return f"{self._root}/{name[:2]}/{name}"

    def lease(self, digests: Iterable[bytes]) -> None:
        """Protect blobs from `trim` until `release`; counted."""
        for digest in digests:
            self._leased[digest] = self._leased.get(digest, 0) + 1

    def release(self, digests: Iterable[bytes]) -> None:
        """End a lease."""
        for digest in digests:
            left = self._leased.get(digest, 0) - 1
            if left > 0:
                self._leased[digest] = left
            else:
                self._leased.pop(digest, None)

    def missing_sync(self, digests: Sequence[bytes], sizes: Sequence[int] = ()) -> list[bytes]:
        """Return those that are not stored; marks the others as used now.

        Args:
            digests: of the blobs.
            sizes: of each, or `ANY_SIZE`; a blob of another size counts as missing. None given
                means any for all.
        """
        missing = []
        stale = time.time() - TOUCH_SECONDS
        for digest, size in zip(digests, sizes or (ANY_SIZE,) * len(digests), strict=True):
            path = self.path(digest)
            try:
                status = os.stat(path)  # noqa: PTH116 - hot
                if not status.st_size or size not in (ANY_SIZE, status.st_size):
                    missing.append(digest)
                elif status.st_mtime < stale:
                    os.utime(path)
            except FileNotFoundError:
                missing.append(digest)
        return missing

    def store_sync(self, blobs: Sequence[tuple[bytes, memoryview | bytes]]) -> None:
        """Verify and store blobs.

        Raises:
            ContextChangedError: bytes that do not hash to their digest.
            QuotaExceededError: the disk is full.
            NodeLostError: it cannot be written.
        """
        for digest, data in blobs:
            if hashlib.sha256(data).digest() != digest:
                raise ContextChangedError(
                    f"a file of the build context changed while it was sent (expected sha256 "
                    f"{digest.hex()[:12]}...); build again"
                )
            self.put_sync(digest, data)

    def put_sync(self, digest: bytes, data: memoryview | bytes) -> None:
        """Store a blob that the caller has verified.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: it cannot be written.
        """
        path = self.path(digest)
        try:
            file = self._create(path, len(data))
            if file < 0:
                return
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
            except BaseException:
                os.unlink(path)  # noqa: PTH108 - hot
                raise
            finally:
                os.close(file)
        except OSError as error:
            raise storage_error("store the build context", error) from error
        self._added_bytes += len(data)

    @staticmethod
    def _create(path: str, size: int) -> int:
        """Return a new open file, or -1 when the blob is there already."""
        try:
            return os.open(path, _NEW_FILE, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - hot
        except FileExistsError:
            if os.stat(path).st_size == size:  # noqa: PTH116 - hot
                return -1
            os.unlink(path)  # noqa: PTH108 - hot
        return os.open(path, _NEW_FILE, 0o600)

    @property
    def trim_due(self) -> bool:
        """Whether enough was added since the last `trim` to make it worth its time."""
        return self._added_bytes > TRIM_SHARE * self._keep_bytes

    def read_sync(self, digest: bytes, size: int = ANY_SIZE, *, verify: bool) -> bytes | None:
        """Return a blob; None when it is missing, or damaged and therefore removed.

        Args:
            digest: of the blob.
            size: that it must have, or `ANY_SIZE`.
            verify: hash it; only a blob that was hashed since the node started needs no more.

        Raises:
            UsageError: the blob is whole, but has another size.
            NodeLostError: it cannot be read.
        """
        path = self.path(digest)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file)
            fits = size in (ANY_SIZE, status.st_size)
            data = os.read(file, min(status.st_size, MAX_BLOB_BYTES + 1))
            if status.st_mtime < time.time() - TOUCH_SECONDS:
                os.utime(file)
            if fits and not verify:
                return data
            if data and hashlib.sha256(data).digest() == digest:
                if not fits:
                    raise UsageError("the client listed a file with a size that it does not have")
                return data
        except OSError as error:
            raise storage_error("read the build context", error) from error
        finally:
            os.close(file)
        log.warning("context.blob.damaged", sha256=digest.hex(), size_bytes=len(data))
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108 - hot
        return None

    def open_sync(self, digest: bytes) -> int:
        """Return a file descriptor of a stored blob; its bytes are not verified.

        Raises:
            NotFoundError: it is not stored.
        """
        try:
            return os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"context file {digest.hex()} is not on this node") from None

    def _open_sync(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(self._root):
            # Half blobs of nodes before version 2 of our API.
            if entry.name.startswith("new-"):
                os.unlink(entry.path)  # noqa: PTH108 - hot

    def trim_sync(self) -> int:
        """Delete the blobs that were not used for longest until the bound holds.

        Returns:
            Bytes that were freed.
        """
        self._added_bytes = 0
        found = []
        total = 0
        for folder in os.scandir(self._root):
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    digest = bytes.fromhex(entry.name)
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, digest))
                    total += status.st_size
        freed = 0
        for _, size, digest in sorted(found):
            if total - freed <= self._keep_bytes:
                break
            if digest in self._leased:
                continue
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(digest))  # noqa: PTH108 - hot
                freed += size
        return freed

    async def trim(self) -> int:
        """Enforce the bound; see `trim_sync`."""
        return await self.run(self.trim_sync)

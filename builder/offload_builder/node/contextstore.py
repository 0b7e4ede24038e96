"""Files of build contexts by content, one store per project.

A blob is stored under its SHA-256 after its bytes were verified; a digest alone gives no access
to another project's bytes, because each project has its own directory. Layout: `ROOT/ab/<hex>`,
and for small blobs `ROOT/small` (`smallblobs`).

A blob is written in its place at once and never synced, so a crash can leave one that is too short
or, after a power cut, of wrong bytes. Therefore a blob that was found and not written by this
build is verified when it is read (0.7 CPU seconds per GB, and BuildKit reads only what it has not
copied before); one that is damaged is removed and counts as missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import structlog

from offload_builder.node.faults import is_full, storage_error
from offload_builder.node.smallblobs import SMALL_BYTES, TOUCH_SECONDS, SmallBlobs
from offload_core.errors import ContextChangedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

T = TypeVar("T")

log = structlog.get_logger(__name__)

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
        self._small = SmallBlobs(root / "small")
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-store")
        self._readers = ThreadPoolExecutor(
            max_workers=READ_THREADS, thread_name_prefix="context-read"
        )
        self._leased: dict[bytes, int] = {}
        self._added_bytes = 0
        self.was_full = False
        """The disk was full; who ends a lease then makes room, for others use the disk as well."""

    async def __aenter__(self) -> Self:
        """Open the store.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: the directory cannot be used.
        """
        try:
            await self.run(self._open_sync)
        except (OSError, sqlite3.Error) as error:
            await self.run(self._small.close)
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
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._small.close()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a `_sync` method in the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )

    async def run_reading(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that only reads in one of the threads for that."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    def path(self, sha256: bytes) -> str:
        """Return where a blob that is not small is or would be."""
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
        wanted = dict(zip(digests, sizes or (ANY_SIZE,) * len(digests), strict=True))
        try:
            found = self._small.sizes(
                [digest for digest, size in wanted.items() if size <= SMALL_BYTES]
            )
        except sqlite3.Error as error:
            raise storage_error("read the build context", error) from error
        stale = time.time() - TOUCH_SECONDS
        for digest, size in wanted.items():
            if digest not in found and (size == ANY_SIZE or size > SMALL_BYTES):
                path = self.path(digest)
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)  # noqa: PTH116 - hot
                    found[digest] = status.st_size
                    if status.st_mtime < stale:
                        os.utime(path)
        return [
            digest
            for digest, size in wanted.items()
            if not (there := found.get(digest, 0)) or size not in (ANY_SIZE, there)
        ]

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
        self.put_many_sync(blobs)

    def put_many_sync(self, blobs: Sequence[tuple[bytes, memoryview | bytes]]) -> None:
        """Store blobs that the caller has verified.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: it cannot be written.
        """
        try:
            try:
                self._put_many(blobs)
            except (OSError, sqlite3.Error) as error:
                # What no build needs now can be sent again; a build that fails cannot be undone.
                if not is_full(error):
                    raise
                self.was_full = True
                if not self.make_room_sync():
                    raise
                self._put_many(blobs)
        except (OSError, sqlite3.Error) as error:
            raise storage_error("store the build context", error) from error

    def _put_many(self, blobs: Sequence[tuple[bytes, memoryview | bytes]]) -> None:
        small = [item for item in blobs if len(item[1]) <= SMALL_BYTES]
        if small:
            self._added_bytes += self._small.put(small)
        if len(small) < len(blobs):
            for digest, data in blobs:
                if len(data) > SMALL_BYTES:
                    self._put_file(digest, data)

    def make_room_sync(self) -> bool:
        """Delete half of what is stored, the oldest first; return whether that freed anything."""
        self.was_full = bool(self._leased)
        with contextlib.suppress(OSError, sqlite3.Error):
            freed = self.trim_sync(share=0.5)
            log.warning("context.trimmed", reason="the disk is full", freed_bytes=freed)
            return freed > 0
        return False

    def _put_file(self, digest: bytes, data: memoryview | bytes) -> None:
        path = self.path(digest)
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
        try:
            data = self._small.read(digest) if size <= SMALL_BYTES else None
            small = data is not None
            if data is None:
                data = self._read_file(digest)
            if data is None and size > SMALL_BYTES:
                data = self._small.read(digest)
                small = data is not None
        except (OSError, sqlite3.Error) as error:
            raise storage_error("read the build context", error) from error
        if data is None:
            return None
        fits = size in (ANY_SIZE, len(data))
        if fits and data and not verify:
            return data
        if data and hashlib.sha256(data).digest() == digest:
            if not fits:
                raise UsageError("the client listed a file with a size that it does not have")
            return data
        log.warning("context.blob.damaged", sha256=digest.hex(), size_bytes=len(data))
        if small:
            self._small.note_damaged(digest)
        else:
            with contextlib.suppress(OSError):
                os.unlink(self.path(digest))  # noqa: PTH108 - hot
        return None

    def read_part_sync(self, digest: bytes, start: int, size: int) -> bytes:
        """Return some bytes of a blob that is leased and was verified.

        Raises:
            NodeLostError: it cannot be read.
        """
        try:
            try:
                file = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return (self._small.read(digest) or b"")[start : start + size]
            try:
                return os.pread(file, size, start)
            finally:
                os.close(file)
        except (OSError, sqlite3.Error) as error:
            raise storage_error("read the build context", error) from error

    def is_whole_sync(self, digest: bytes, size: int) -> bool:
        """Return whether a blob is stored whole, as `read_sync` would verify it.

        Takes no memory for it; for blobs that are not small.

        Raises:
            UsageError: the blob is whole, but has another size.
            NodeLostError: it cannot be read.
        """
        try:
            with open(self.path(digest), "rb", buffering=0) as file:  # noqa: PTH123 - text
                fits = os.fstat(file.fileno()).st_size == size
                found = hashlib.file_digest(file, "sha256").digest() if fits else b""
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error("read the build context", error) from error
        return found == digest or self.read_sync(digest, size, verify=True) is not None

    def _read_file(self, digest: bytes) -> bytes | None:
        try:
            file = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(file)
            if status.st_mtime < time.time() - TOUCH_SECONDS:
                os.utime(file)
            return os.read(file, min(status.st_size, MAX_BLOB_BYTES + 1))
        finally:
            os.close(file)

    def _open_sync(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._small.open()
        for entry in os.scandir(self._root):
            # Half blobs of nodes before version 2 of our API.
            if entry.name.startswith("new-"):
                os.unlink(entry.path)  # noqa: PTH108 - hot

    def trim_sync(self, *, share: float = 1.0) -> int:
        """Delete the blobs that were not used for longest until the bound holds.

        Args:
            share: of what is stored, to keep at most.

        Returns:
            Bytes that were freed.
        """
        self._added_bytes = 0
        found = self._stored_sync()
        total = sum(size for _, size, _ in found)
        keep_bytes = min(self._keep_bytes, int(share * total))
        leased = self._small.segments_of(list(self._leased))
        freed = 0
        for _, size, name in sorted(found, key=lambda item: item[0]):
            if total - freed <= keep_bytes:
                break
            if isinstance(name, int):
                if name not in leased:
                    self._small.remove(name)
                    freed += size
            elif name not in self._leased:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(name))  # noqa: PTH108 - hot
                    freed += size
        return freed

    def _stored_sync(self) -> list[tuple[float, int, bytes | int]]:
        """Return time of use, bytes and name of all that is stored."""
        found: list[tuple[float, int, bytes | int]] = [*self._small.segments()]
        for folder in os.scandir(self._root):
            if not folder.is_dir() or folder.name == "small":
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    digest = bytes.fromhex(entry.name)
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, digest))
        return found

    async def used_bytes(self) -> int:
        """Return the bytes of all that is stored."""
        return sum(size for _, size, _ in await self.run(self._stored_sync))

    async def trim(self) -> int:
        """Enforce the bound; see `trim_sync`."""
        return await self.run(self.trim_sync)

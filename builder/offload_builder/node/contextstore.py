"""Files of build contexts by content, one store per project.

A blob is stored under its SHA-256 after its bytes were verified; a digest alone gives no access
to another project's bytes, because each project has its own directory. Layout: `ROOT/ab/<hex>`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from offload_builder.node.faults import storage_error
from offload_core.errors import ContextChangedError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

T = TypeVar("T")

TOUCH_SECONDS = 3600.0
"""How stale a file's access mark may be; a write per use would cost more than it tells."""
TRIM_SHARE = 0.1
"""The bound is enforced each time that so much of it was added."""


class ContextStore:
    """Content-addressed files below one directory.

    Methods with `_sync` in their name block and run in the store's own thread: many small files
    are faster in one thread than handed over one by one.
    """

    def __init__(self, root: Path, *, keep_bytes: int) -> None:
        self._root = root
        self._keep_bytes = keep_bytes
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-store")
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
            raise storage_error("store build contexts", error) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a `_sync` method in the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )

    def close_later(self, blob: PartialBlob) -> None:
        """Close a blob behind the work on it that is under way in the store's thread."""
        try:
            self._executor.submit(blob.close)
        except RuntimeError:  # the store is closed, and with it its thread
            blob.close()

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

    def missing_sync(self, digests: Sequence[bytes]) -> list[bytes]:
        """Return those that are not stored; marks the others as used now."""
        missing = []
        now = time.time()
        for digest in digests:
            path = self.path(digest)
            try:
                if os.stat(path).st_mtime < now - TOUCH_SECONDS:  # noqa: PTH116 - hot
                    os.utime(path)
            except FileNotFoundError:
                missing.append(digest)
        return missing

    def store_sync(self, blobs: Sequence[tuple[bytes, memoryview | bytes]]) -> None:
        """Verify and store whole blobs.

        Raises:
            ContextChangedError: bytes that do not hash to their digest.
            QuotaExceededError: the disk is full.
        """
        for digest, data in blobs:
            if hashlib.sha256(data).digest() != digest:
                raise _mismatch(digest)
            with self.begin_sync(digest) as file:
                file.write(data)
                file.commit()

    @property
    def trim_due(self) -> bool:
        """Whether enough was added since the last `trim` to make it worth its time."""
        return self._added_bytes > TRIM_SHARE * self._keep_bytes

    def added(self, size_bytes: int) -> None:
        """Count what was stored; called by `PartialBlob`."""
        self._added_bytes += size_bytes

    def begin_sync(self, digest: bytes) -> PartialBlob:
        """Open a blob that arrives in pieces; the caller closes it."""
        return PartialBlob(self, digest)

    def open_sync(self, digest: bytes) -> int:
        """Return a file descriptor of a stored blob.

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
                    found.append((status.st_mtime, status.st_size, entry.path, digest))
                    total += status.st_size
        freed = 0
        for _, size, path, digest in sorted(found):
            if total - freed <= self._keep_bytes:
                break
            if digest in self._leased:
                continue
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - hot
                freed += size
        return freed

    async def trim(self) -> int:
        """Enforce the bound; see `trim_sync`."""
        return await self.run(self.trim_sync)


class PartialBlob:
    """A blob while it arrives; becomes visible only after its digest was verified."""

    def __init__(self, store: ContextStore, digest: bytes) -> None:
        self._store = store
        self._digest = digest
        self._hash = hashlib.sha256()
        self._path = f"{store._root}/new-{secrets.token_hex(8)}"
        self._file = -1
        self._size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: it does not work.
        """
        try:
            if self._file < 0:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise storage_error("store the build context", error) from error
        self._hash.update(data)
        self._size_bytes += len(data)

    def commit(self) -> None:
        """Verify and publish.

        Raises:
            ContextChangedError: the bytes do not hash to the digest.
            QuotaExceededError: the disk is full.
        """
        if self._hash.digest() != self._digest:
            raise _mismatch(self._digest)
        self.write(b"")
        target = self._store.path(self._digest)
        try:
            try:
                os.rename(self._path, target)  # noqa: PTH104 - hot
            except FileNotFoundError:
                os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120 - hot
                os.rename(self._path, target)  # noqa: PTH104 - hot
        except OSError as error:
            raise storage_error("store the build context", error) from error
        self._store.added(self._size_bytes)

    def close(self) -> None:
        """Release the file; what was not committed is deleted."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)  # noqa: PTH108 - hot


def _mismatch(digest: bytes) -> ContextChangedError:
    return ContextChangedError(
        f"a file of the build context changed while it was sent (expected sha256 "
        f"{digest.hex()[:12]}...); build again"
    )

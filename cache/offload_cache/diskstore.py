"""Blobs of one project on the node's disk.

Layout below the root: `blobs/sha256/ab/<64 hex>` for whole, verified blobs, `ingest/` for files
that are still being written, `boot` for the kernel's boot id of the last start. A blob appears
under its name by a rename after its size and digest were checked, so no reader meets a partial one.

Files are not synced one by one: that would cost more than the copy. Instead, after a reboot the
blobs written in the last minutes before it count as suspect and are hashed again before use. Each
is marked in its mode until then, because the process may start many times after one reboot.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from offload_core.digest import digest_hex, sha256_digest
from offload_core.errors import DigestMismatchError, NotFoundError, QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_log = structlog.get_logger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SUSPECT_WINDOW_SECONDS = 600.0  # ext4 and xfs write dirty pages back within 30-60 s
_TOUCH_INTERVAL_SECONDS = 60.0
_HASH_PIECE_BYTES = 1 << 20
_SUSPECT_MODE = stat.S_ISVTX  # on a file it means nothing to the kernel
TRIM_TARGET = 0.9
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob on disk; `used_at` is seconds since the epoch, one minute exact."""

    digest: str
    size_bytes: int
    used_at: float


@dataclass(frozen=True, slots=True)
class TrimResult:
    """What one `trim` removed and what is left."""

    removed_blobs: int
    removed_bytes: int
    used_bytes: int


def disk_error(error: OSError, root: Path) -> Exception:
    """Return the error of our tree for a full disk, any other error unchanged."""
    if error.errno in _FULL:
        return QuotaExceededError(
            f"the node's disk below {root} is full; free space or lower the cache's size limit"
        )
    return error


class DiskStore:
    """Verified blobs below one root. All methods are blocking and safe to call from any thread."""

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._blobs = root / "blobs" / "sha256"
        self._ingests = root / "ingest"
        self._lock = threading.Lock()
        self._leases: Counter[str] = Counter()
        self._suspects: set[str] = set()
        self._used_bytes = 0

    def open(self) -> None:
        """Create the layout, drop what a crash left half written and count the bytes in use."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._ingests.mkdir(exist_ok=True)
        for leftover in self._ingests.iterdir():
            leftover.unlink()
            _log.info("blob.ingest.removed", path=str(leftover))
        boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        marker = self.root / "boot"
        rebooted = marker.exists() and marker.read_text().strip() != boot_id
        written: dict[str, float] = {}
        used_bytes = 0
        for path in self._files():
            found = path.stat()
            digest = "sha256:" + path.name
            used_bytes += found.st_size
            written[digest] = found.st_mtime
            if found.st_mode & _SUSPECT_MODE:
                self._suspects.add(digest)
        if rebooted and written:
            newest = max(written.values())
            for digest, at in written.items():
                if at > newest - _SUSPECT_WINDOW_SECONDS and digest not in self._suspects:
                    self._suspects.add(digest)
                    _mark_suspect(self.blob_path(digest), suspect=True)
        self._used_bytes = used_bytes
        marker.write_text(boot_id)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs; files still being written are not counted."""
        return self._used_bytes

    @property
    def over_limit(self) -> bool:
        """Whether `trim` would remove something."""
        return self.max_bytes is not None and self._used_bytes > self.max_bytes

    def _files(self) -> Iterator[Path]:
        if not self._blobs.is_dir():
            return
        for folder in self._blobs.iterdir():
            yield from folder.iterdir()

    def blob_path(self, digest: str) -> Path:
        """Return where a blob lies or would lie; says nothing about whether it is there."""
        name = digest_hex(digest)
        return self._blobs / name[:2] / name

    def is_suspect(self, digest: str) -> bool:
        """Whether `find` would hash the blob again, which is slow for a large one."""
        return digest in self._suspects

    def suspects(self) -> list[str]:
        """Return the blobs that `find` would hash again, and `has` does not count."""
        return list(self._suspects)

    def find(self, digest: str) -> Path | None:
        """Return the path of a whole, verified blob and note its use; None when it is not here."""
        path = self.blob_path(digest)
        if digest in self._suspects and not self._clear_suspect(digest, path):
            return None
        try:
            found = path.stat()
            now = time.time()
            if now - found.st_atime > _TOUCH_INTERVAL_SECONDS:
                os.utime(path, ns=(int(now * 1e9), found.st_mtime_ns))
        except FileNotFoundError:
            return None
        return path

    def has(self, digest: str) -> bool:
        """Whether a verified blob is here, without noting a use and without any slow work."""
        return digest not in self._suspects and self.blob_path(digest).exists()

    def size(self, digest: str) -> int | None:
        """Return the bytes of a blob, None when it is not here."""
        path = self.find(digest)
        if path is None:
            return None
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def _clear_suspect(self, digest: str, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == digest[7:]
            if whole:
                _mark_suspect(path, suspect=False)
        except OSError:  # gone, or the disk cannot read it back
            whole = False
        if not whole:
            self.delete(digest)
            _log.warning("blob.damaged", digest=digest, action="removed")
        self._suspects.discard(digest)
        return whole

    def ingest(self) -> Ingest:
        """Start a new blob; its owner commits or aborts it.

        Raises:
            QuotaExceededError: the disk is full.
        """
        return Ingest(self, self._ingests / uuid.uuid4().hex)

    def put(self, data: bytes, digest: str | None = None) -> str:
        """Store a small blob and return its digest.

        Raises:
            DigestMismatchError: `data` is not what `digest` names.
            QuotaExceededError: the disk is full.
        """
        actual = sha256_digest(data)
        if digest is not None and digest != actual:
            raise DigestMismatchError(f"the content has digest {actual}, not {digest}")
        if self.find(actual) is None:
            ingest = self.ingest()
            try:
                ingest.write(data)
                ingest.commit(actual, len(data))
            finally:
                ingest.abort()
        return actual

    def read(self, digest: str) -> bytes:
        """Return a small blob.

        Raises:
            NotFoundError: it is not on this disk.
        """
        path = self.find(digest)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                return path.read_bytes()
        raise NotFoundError(f"blob {digest} is not on this node")

    def adopt(self, ingested: Path, digest: str, size_bytes: int) -> None:
        """Move a verified file under its name; the file is gone afterwards in every case."""
        path = self.blob_path(digest)
        with self._lock:
            if path.exists() and digest not in self._suspects:
                ingested.unlink()
                return
            previous = path.stat().st_size if path.exists() else 0
            try:
                ingested.rename(path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                ingested.rename(path)
            self._suspects.discard(digest)
            self._used_bytes += size_bytes - previous

    def delete(self, digest: str) -> int:
        """Remove a blob and return the bytes freed; 0 when it was not here."""
        path = self.blob_path(digest)
        with self._lock:
            try:
                size_bytes = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return 0
            self._used_bytes -= size_bytes
            return size_bytes

    def is_leased(self, digest: str) -> bool:
        """Whether somebody keeps a blob from being trimmed now."""
        with self._lock:
            return digest in self._leases

    def delete_unused(self, digest: str, used_until: float) -> int:
        """Remove a blob that nobody holds and that was not used after a moment.

        Args:
            digest: the blob.
            used_until: `BlobInfo.used_at` of when it was chosen.

        Returns:
            The bytes freed; 0 when it is leased, was used meanwhile or is not here.
        """
        path = self.blob_path(digest)
        with self._lock:
            try:
                found = path.stat()
                if digest in self._leases or found.st_atime > used_until:
                    return 0
                path.unlink()
            except FileNotFoundError:
                return 0
            self._used_bytes -= found.st_size
            return found.st_size

    def blobs(self) -> Iterator[BlobInfo]:
        """List all blobs, in no order; those that vanish meanwhile are left out."""
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                yield BlobInfo("sha256:" + path.name, found.st_size, found.st_atime)

    @contextlib.contextmanager
    def lease(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep blobs from being trimmed, whether they are here already or come later."""
        held = list(digests)
        with self._lock:
            self._leases.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._leases.subtract(held)
                for digest in held:
                    if self._leases[digest] <= 0:
                        del self._leases[digest]

    def trim(self, keep: Collection[str] = ()) -> TrimResult:
        """Remove the least recently used blobs until 90 % of `max_bytes` are in use.

        Blobs in `keep` and leased ones stay, even when the store is then still too large. The
        tenth below the limit makes room for the next writes, so that not each of them trims.
        """
        removed_blobs = removed_bytes = 0
        if self.max_bytes is None or not self.over_limit:
            return TrimResult(0, 0, self._used_bytes)
        target = int(self.max_bytes * TRIM_TARGET)
        kept = frozenset(keep)
        for blob in sorted(self.blobs(), key=lambda blob: blob.used_at):
            if self._used_bytes <= target:
                break
            if blob.digest in kept:
                continue
            freed = self.delete_unused(blob.digest, blob.used_at)
            removed_bytes += freed
            removed_blobs += freed > 0
        _log.info(
            "blobs.trimmed",
            removed_blobs=removed_blobs,
            removed_bytes=removed_bytes,
            used_bytes=self._used_bytes,
            limit_bytes=self.max_bytes,
        )
        return TrimResult(removed_blobs, removed_bytes, self._used_bytes)


def _mark_suspect(path: Path, *, suspect: bool) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | _SUSPECT_MODE if suspect else mode & ~_SUSPECT_MODE)


class Ingest:
    """One blob being written. A lock makes it safe to abort while a thread still writes."""

    def __init__(self, store: DiskStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._hash = hashlib.sha256()
        self._in_order = True
        self._lock = threading.Lock()
        self.size_bytes = 0
        try:
            # Unbuffered: callers write large pieces, and `write_at` needs no second position.
            self._file: FileIO | None = FileIO(path, "x+")
        except OSError as error:
            raise disk_error(error, store.root) from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            NotFoundError: the ingest was aborted.
            QuotaExceededError: the disk is full.
        """
        with self._lock:
            file = self._opened()
            self._hash.update(data)
            view = memoryview(data)
            try:
                while view:
                    view = view[file.write(view) :]
            except OSError as error:
                raise disk_error(error, self._store.root) from error
            self.size_bytes += len(data)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at an offset, in any order; the digest is then computed by `commit`.

        Raises:
            NotFoundError: the ingest was aborted.
            QuotaExceededError: the disk is full.
        """
        with self._lock:
            self._in_order = False
            view = memoryview(data)
            try:
                while view:
                    written = os.pwrite(self._opened().fileno(), view, offset)
                    offset += written
                    view = view[written:]
            except OSError as error:
                raise disk_error(error, self._store.root) from error

    def _opened(self) -> FileIO:
        if self._file is None:
            raise NotFoundError("this upload was ended")
        return self._file

    def commit(self, digest: str | None = None, size_bytes: int | None = None) -> BlobInfo:
        """Make the blob visible under its digest, when it is what the arguments say.

        Raises:
            DigestMismatchError: size or digest differ; nothing is kept.
            NotFoundError: the ingest was aborted.
            QuotaExceededError: the disk is full.
        """
        with self._lock:
            if not self._in_order:
                self._hash_again()
            actual = "sha256:" + self._hash.hexdigest()
            if size_bytes is not None and size_bytes != self.size_bytes:
                self._discard()
                raise DigestMismatchError(
                    f"blob {digest or actual} has {self.size_bytes} bytes, "
                    f"{size_bytes} were announced"
                )
            if digest is not None and digest != actual:
                self._discard()
                raise DigestMismatchError(f"the content has digest {actual}, not {digest}")
            self._opened().close()
            self._file = None
            try:
                self._store.adopt(self._path, actual, self.size_bytes)
            except OSError as error:
                self._path.unlink(missing_ok=True)
                raise disk_error(error, self._store.root) from error
            return BlobInfo(actual, self.size_bytes, time.time())

    def _hash_again(self) -> None:
        file = self._opened()
        file.seek(0)
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        while piece := file.read(_HASH_PIECE_BYTES):
            self._hash.update(piece)
            self.size_bytes += len(piece)

    def abort(self) -> None:
        """Forget what was written; does nothing after a commit."""
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)

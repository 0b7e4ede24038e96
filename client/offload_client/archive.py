"""Unpack a tar stream into a directory of the user's, for `-o type=local`.

Nothing is written outside the destination: names are checked, and no symbolic link is followed,
neither one of the archive nor one that was there before. Owners become the local user, so the
setuid and setgid bits are dropped (they would hand out that user's rights); all other mode bits
and the modification times are kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tarfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, cast

from offload_client.bytepipe import BytePipe, stream_through
from offload_client.eventlog import get_logger
from offload_core.errors import ConfigError, InternalError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_log = get_logger()

_COPY_BYTES = 1 << 20
_KEPT_BITS = 0o1777
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class UnpackStats:
    """What was written: entries that are no directories, and bytes of regular files."""

    files: int
    size_bytes: int


async def unpack_archive(chunks: AsyncIterator[bytes], destination: Path) -> UnpackStats:
    """Write the content of an uncompressed tar stream below `destination`, which is created.

    Existing files are replaced, other files are left alone. Devices are skipped with a warning.
    Memory is bounded (8 MiB in flight). On an error or a cancellation the files written so far
    stay, as with docker's local exporter.

    Raises:
        ConfigError: the destination cannot be written; the sentence names the path.
        InternalError: the stream is no whole tar archive, or tries to leave the destination.
    """

    async def produce(pipe: BytePipe) -> None:
        async for chunk in chunks:
            await pipe.write(chunk)

    unpacker = _Unpacker(destination)
    return await stream_through(produce, unpacker.run, name="unpack-archive")


class _Unpacker:
    """One unpacking; used by one thread."""

    def __init__(self, destination: Path) -> None:
        self._root = destination
        self._links: set[Path] = set()
        self._safe: set[Path] = set()
        self._directories: list[tuple[Path, tarfile.TarInfo]] = []
        self._files = 0
        self._bytes = 0

    def run(self, pipe: BytePipe) -> UnpackStats:
        current = self._root
        try:
            make_private(self._root)
            # The pipe has the one method that tarfile's stream mode calls.
            stream = cast("IO[bytes]", pipe)
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_COPY_BYTES) as archive:
                for member in archive:
                    current = self._root / member.name
                    self._write(archive, member)
            while pipe.read(_COPY_BYTES):
                pass
            for path, member in reversed(self._directories):
                current = path
                path.chmod(member.mode & _KEPT_BITS)
                os.utime(path, (member.mtime, member.mtime))
        except tarfile.TarError as error:
            raise InternalError(
                f"the output of the build arrived damaged after {self._files} files ({error}); "
                "run the build again"
            ) from error
        except OSError as error:
            raise ConfigError(_explain(current, error)) from error
        return UnpackStats(files=self._files, size_bytes=self._bytes)

    def _write(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _split(member.name)
        if not parts:
            if member.isdir():
                return
            raise InternalError(f"the output of the build has a file without a name: {member!r}")
        path = self._root.joinpath(*parts)
        self._make_parents(path)
        if member.isdir():
            self._make_directory(path)
            self._directories.append((path, member))
            return
        self._clear(path)
        if member.issym():
            path.symlink_to(member.linkname)
            self._links.add(path)
        elif member.islnk():
            self._link(path, member)
        elif member.isreg():
            self._copy(archive, member, path)
        elif member.isfifo():
            os.mkfifo(path, member.mode & _KEPT_BITS)
        else:
            _log.warning("archive.device.skipped", path=member.name)
            return
        self._files += 1

    def _make_parents(self, path: Path) -> None:
        """Make sure that every directory above `path` is a real one."""
        if path.parent in self._safe:
            return
        missing: list[Path] = []
        for parent in path.parents:
            if parent == self._root:
                break
            missing.append(parent)
        for parent in reversed(missing):
            self._make_directory(parent)

    def _make_directory(self, path: Path) -> None:
        if path in self._safe:
            return
        if path in self._links:
            raise InternalError(
                f"the output of the build writes through its own symbolic link {path}; refused"
            )
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            path.mkdir()
        else:
            if not stat.S_ISDIR(mode):
                path.unlink()
                path.mkdir()
            elif not mode & stat.S_IWUSR:
                # An earlier output may have made it read-only; the end sets its mode again.
                path.chmod(stat.S_IMODE(mode) | stat.S_IRWXU)
        self._safe.add(path)

    def _clear(self, path: Path) -> None:
        self._links.discard(path)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            # Linux says EISDIR, macOS EPERM.
            if error.errno in {errno.EISDIR, errno.EPERM} and path.is_dir():
                raise ConfigError(
                    f"{path} is a directory, but the build produced a file of that name; "
                    "remove the directory or choose another destination"
                ) from error
            raise

    def _link(self, path: Path, member: tarfile.TarInfo) -> None:
        target = self._root.joinpath(*_split(member.linkname))
        for parent in target.parents:
            if parent == self._root:
                break
            if parent.is_symlink():
                raise InternalError(
                    f"the output of the build links through the symbolic link {parent}; refused"
                )
        if not os.path.lexists(target):
            raise InternalError(f"the output of the build has a link to {target}, which is missing")
        try:
            os.link(target, path, follow_symlinks=False)
        except OSError:
            # No hard links on this file system.
            shutil.copy2(target, path, follow_symlinks=False)

    def _copy(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        content = archive.extractfile(member)
        if content is None:
            raise InternalError(f"the output of the build has no content for {member.name}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY
        with content, open(os.open(path, flags, 0o600), "wb", buffering=0) as file:  # noqa: PTH123
            left = member.size
            while left:
                data = content.read(min(left, _COPY_BYTES))
                if not data:
                    raise tarfile.ReadError("unexpected end of data")
                file.write(data)
                left -= len(data)
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), member.mode & _KEPT_BITS)
        with contextlib.suppress(OverflowError):
            os.utime(path, (member.mtime, member.mtime))
        self._bytes += member.size


def _split(name: str) -> list[str]:
    """Return the parts of an archive name; refuses every way out of the destination."""
    if "\0" in name or (os.name == "nt" and ("\\" in name or ":" in name)):
        raise InternalError(f"the output of the build has a forbidden file name {name!r}")
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise InternalError(f"the output of the build tries to leave its directory: {name!r}")
    return parts


def _explain(path: Path, error: OSError) -> str:
    named = error.filename if isinstance(error.filename, str) else str(path)
    if error.errno == errno.ENOSPC:
        return f"the disk of {named} is full; free some space or choose another destination"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{named} is in the way of the output: it is not a directory"
    return f"cannot write the output to {named}: {error.strerror}"


def make_private(folder: Path) -> None:
    """Make a directory and those above it that are missing, for its owner only, as buildx does.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in folder.parents if not path.exists()]
    for path in (*reversed(missing), folder):
        path.mkdir(mode=0o700, exist_ok=True)

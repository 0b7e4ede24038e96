"""A build context on standard input: a tar archive, compressed or not, or a Dockerfile.

An archive goes uncompressed into a temporary file without a name, which the system removes with
the last descriptor of it, whatever ends this process.
Source: the magic numbers are those of RFC 1952 (gzip), bzip2, xz and RFC 8878 (zstd); a tar header
is one with a right checksum, as in pax(1p).
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import tarfile
import tempfile
import zlib
from typing import IO, TYPE_CHECKING, cast

from offload_client.build.standardinput import PIPE_BYTES
from offload_core.errors import ContextError
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from offload_client.build.standardinput import StandardInput

HEAD_BYTES = 512
_COPY_BYTES = 1 << 20
_GZIP = b"\x1f\x8b\x08"
_BZIP2 = b"BZh"
_XZ = b"\xfd7zXZ\x00"
_ZSTD = b"\x28\xb5\x2f\xfd"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_archive(head: bytes) -> bool:
    """Return whether the first `HEAD_BYTES` are those of a tar archive, compressed or not."""
    return _decompressor(head) is not None or _is_tar_header(head)


def spool(source: StandardInput, directory: Path | None) -> IO[bytes]:
    """Return a nameless temporary file with the uncompressed archive; the caller closes it.

    Args:
        source: standard input.
        directory: where the file is; None for the system's place.

    Raises:
        ContextError: the archive is damaged or cut off, the disk is full, or its compression is
            not supported here.
        ReadingStoppedError: see `StopReading`.
    """
    decompress = _decompressor(source.peek(HEAD_BYTES))
    file = _temporary_file(directory)
    try:
        buffered = io.BufferedReader(source, PIPE_BYTES)
        raw = cast("IO[bytes]", buffered)
        _copy(decompress(raw) if decompress is not None else buffered, file)
    except BaseException:
        file.close()
        raise
    return file


def _temporary_file(directory: Path | None) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix="offload-context-", buffering=0, dir=directory)
    except OSError as error:
        raise ContextError(
            f"cannot create a temporary file for the build context: {error.strerror}",
            hint="set TMPDIR to a directory that can be written",
        ) from error


def _copy(source: io.BufferedIOBase, file: IO[bytes]) -> None:
    buffer = memoryview(bytearray(_COPY_BYTES))
    copied = 0
    while count := _next(source, buffer):
        left = buffer[:count]
        while left:
            try:
                left = left[file.write(left) :]
            except OSError as error:
                raise _unwritable(error, copied) from error
        copied += count


def _next(source: io.BufferedIOBase, buffer: memoryview) -> int:
    try:
        return source.readinto(buffer)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        # Standard input's own errors are none of these.
        raise ContextError(
            f"the archive on standard input is damaged or cut off: {error or 'it ends too early'}"
        ) from error


def _unwritable(error: OSError, copied: int) -> ContextError:
    if error.errno in _FULL:
        return ContextError(
            "no space is left for the copy of the build context on standard input after "
            f"{format_size(copied)}",
            hint="set TMPDIR to a directory with more space, or build from a directory",
        )
    return ContextError(f"cannot copy the build context on standard input: {error.strerror}")


def _decompressor(head: bytes) -> Callable[[IO[bytes]], io.BufferedIOBase] | None:
    if head.startswith(_GZIP):
        return lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")
    if head.startswith(_BZIP2):
        return bz2.BZ2File
    if head.startswith(_XZ):
        return lzma.LZMAFile
    if head.startswith(_ZSTD) or _is_skippable(head):
        return lambda raw: io.BufferedReader(_ZstdInput(raw), PIPE_BYTES)
    return None


def _is_skippable(head: bytes) -> bool:
    """Return whether a zstd frame without content begins here (RFC 8878, 3.1.2)."""
    return len(head) >= 8 and int.from_bytes(head[:4], "little") & 0xFFFFFFF0 == 0x184D2A50


class _ZstdInput(io.RawIOBase):
    """Uncompressed zstd; damage is an `OSError`, as with the other compressions."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ContextError(
                "the archive on standard input is compressed with zstd, and the zstandard package "
                "that would unpack it is not installed",
                hint='install it with: pip install "offload-build[compress]"',
            ) from error
        self._damage = zstandard.ZstdError
        self._reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._reader.readinto(buffer)
        except self._damage as error:
            raise OSError(str(error)) from error


def _is_tar_header(head: bytes) -> bool:
    if len(head) < HEAD_BYTES:
        return False
    if not any(head):
        # An archive without entries.
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True

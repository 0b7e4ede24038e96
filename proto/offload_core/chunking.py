"""Cuts large files into pieces where their content says so, and hashes the pieces.

A change inside a file leaves the borders before and behind it as they were, so that only the
pieces that it touches travel again. Borders are found with FastCDC (Xia et al., 2020). Without
its compiled part, which is 200 times faster than the other, pieces have one fixed size: the other
side takes any list of pieces.

Files are read into windows, and not mapped: a mapped file that is truncated ends the program.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from offload_core.chunklist import Chunk

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future
    from types import TracebackType

    from pyfastcdc import FastCDC

_KIB = 1 << 10
_MIB = 1 << 20
_GIB = 1 << 30
_WINDOW_BYTES = 4 * _MIB
_BLOCK_BYTES = 512
"""Unit of st_blocks."""


class PieceSizes(NamedTuple):
    """How large pieces are, in bytes.

    Attributes:
        average: the aim.
        minimum: no piece is smaller, except the last.
        maximum: no piece is larger.
    """

    average: int
    minimum: int
    maximum: int


_SMALL = PieceSizes(256 * _KIB, 64 * _KIB, _MIB)
"""1 MB inserted into 500 MB sends 2.0 MB; 16 changes of 64 KB send 13 MB, and 31 MB with 1 MiB."""
_MEDIUM = PieceSizes(_MIB, 256 * _KIB, 4 * _MIB)
_LARGE = PieceSizes(4 * _MIB, _MIB, 8 * _MIB)


def piece_sizes(size_bytes: int) -> PieceSizes:
    """Return the sizes of pieces for a file; they depend on nothing else.

    They grow with the file, so that its list of pieces fits into one message.
    """
    if size_bytes <= 4 * _GIB:
        return _SMALL
    return _MEDIUM if size_bytes <= 256 * _GIB else _LARGE


class ChunkedFile(NamedTuple):
    """The pieces of a file, and how many bytes were found."""

    chunks: list[Chunk]
    size_bytes: int


class Chunker:
    """Cuts files; for one thread at a time; closed by its owner.

    Pieces are hashed in a second thread while the next window is read and cut, which takes a
    third off the time.
    """

    def __init__(self) -> None:
        self._executor: Executor | None = None
        self._windows: list[memoryview] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the second thread; harmless when done twice."""
        self._windows.clear()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def cut(self, fd: int, size_bytes: int, *, start: int | None = None) -> ChunkedFile:
        """Read a file from its start to its end, or to somewhere behind `size_bytes`.

        Holes are not read. The same bytes give the same pieces, with holes or without.

        Args:
            fd: descriptor of a regular file.
            size_bytes: its size as listed, which decides how large pieces are. A file that has
                another size by now gives another `ChunkedFile.size_bytes`.
            start: the file is a part of another one, which begins there and ends after
                `size_bytes`.

        Raises:
            OSError: it cannot be read.
        """
        sizes = piece_sizes(size_bytes)
        needed = max(_WINDOW_BYTES, 2 * sizes.maximum)
        if not self._windows or len(self._windows[0]) < needed:
            self._windows = [memoryview(bytearray(needed)) for _ in range(2)]
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor

            self._executor = ThreadPoolExecutor(1, thread_name_prefix="context-pieces")
        return _Run(fd, size_bytes, sizes, self._windows, self._executor, start).cut()


class _Run:
    """One file. Two windows take turns; what one leaves over goes to the start of the other."""

    def __init__(
        self,
        fd: int,
        size_bytes: int,
        sizes: PieceSizes,
        windows: list[memoryview],
        executor: Executor,
        start: int | None,
    ) -> None:
        self._fd = fd
        self._size = size_bytes
        self._start = start or 0
        self._limit = None if start is None else size_bytes
        self._sizes = sizes
        self._windows = windows
        self._executor = executor
        self._find_pieces = _cutter(sizes)
        self._sparse = start is None and os.fstat(fd).st_blocks * _BLOCK_BYTES < size_bytes
        self._chunks: list[Chunk] = []
        self._hashing: list[Future[list[Chunk]]] = []

    def cut(self) -> ChunkedFile:
        try:
            size = self._read()
            self._settle(0)
        finally:
            # The windows belong to the next file when this returns.
            for future in self._hashing:
                future.exception()
        return ChunkedFile(self._chunks, size)

    def _read(self) -> int:
        position, turn = 0, 0
        left = self._windows[0][:0]
        while True:
            if self._sparse and (pieces := self._pieces_of_hole(position)):
                self._settle(0)
                self._chunks += pieces
                position += sum(piece.size_bytes for piece in pieces)
                left = left[:0]
            # The other window is free once at most the latest one is still being hashed.
            self._settle(1)
            window = self._windows[turn]
            filled = self._fill(window, position, left)
            ended = filled < len(window) or position + filled > self._size
            found = self._find_pieces(window[:filled], ended=ended)
            self._hashing.append(self._executor.submit(_hash_pieces, window, found))
            used = sum(found)
            position += used
            if ended:
                return position
            left = window[used:filled]
            turn = 1 - turn

    def _fill(self, window: memoryview, position: int, left: memoryview) -> int:
        filled = len(left)
        window[:filled] = left
        if self._limit is not None:
            window = window[: self._limit - position]
        os.lseek(self._fd, self._start + position + filled, os.SEEK_SET)
        while filled < len(window):
            read = os.readv(self._fd, [window[filled:]])
            if not read:
                break
            filled += read
        return filled

    def _settle(self, left: int) -> None:
        """Take the pieces of hashed windows, waiting until only so many are being hashed."""
        while len(self._hashing) > left:
            self._chunks += self._hashing.pop(0).result()

    def _pieces_of_hole(self, position: int) -> list[Chunk]:
        """Return the pieces from here on that certainly are holes and nothing else."""
        hole = self._hole_end(position) - position
        # A piece is as in a file without holes only when all bytes that decide on it are zero.
        if hole < self._sizes.maximum:
            return []
        piece = self._zero_piece
        return [piece] * ((hole - self._sizes.maximum) // piece.size_bytes + 1)

    def _hole_end(self, position: int) -> int:
        if position >= self._size or not hasattr(os, "SEEK_HOLE"):
            return position
        try:
            if os.lseek(self._fd, position, os.SEEK_HOLE) != position:
                return position
        except OSError:
            return position
        try:
            return os.lseek(self._fd, position, os.SEEK_DATA)
        except OSError:
            # No data up to the end, which can be another by now.
            return min(os.fstat(self._fd).st_size, self._size)

    @functools.cached_property
    def _zero_piece(self) -> Chunk:
        zeros = memoryview(bytes(2 * self._sizes.maximum))
        return _hash_pieces(zeros, self._find_pieces(zeros, ended=False)[:1])[0]


def _hash_pieces(window: memoryview, sizes: list[int]) -> list[Chunk]:
    chunks: list[Chunk] = []
    at = 0
    for size in sizes:
        chunks.append(Chunk(hashlib.sha256(window[at : at + size]).digest(), size))
        at += size
    return chunks


class _Cutter(Protocol):
    def __call__(self, view: memoryview, *, ended: bool) -> list[int]:
        """Return the sizes of the pieces from the start of a window on.

        What follows the window could move the last border, so bytes are left over unless the
        file ends there.
        """


def _cutter(sizes: PieceSizes) -> _Cutter:
    compiled = _compiled()
    if compiled is None:
        return functools.partial(_cut_evenly, sizes.average)
    search = compiled(sizes.average, min_size=sizes.minimum, max_size=sizes.maximum)
    return functools.partial(_cut_by_content, search, sizes.maximum)


def _compiled() -> type[FastCDC] | None:
    with warnings.catch_warnings():
        # It warns when its compiled part is missing, which is no matter here.
        warnings.simplefilter("ignore")
        from pyfastcdc import FastCDC
    return FastCDC if FastCDC.__module__.startswith("pyfastcdc.cy") else None


def _cut_by_content(search: FastCDC, maximum: int, view: memoryview, *, ended: bool) -> list[int]:
    left = len(view)
    kept = 0 if ended else maximum - 1
    found = search.cut_buf(view)
    pieces: list[int] = []
    while left > kept:
        pieces.append(next(found).length)
        left -= pieces[-1]
    return pieces


def _cut_evenly(size: int, view: memoryview, *, ended: bool) -> list[int]:
    whole, rest = divmod(len(view), size)
    return [size] * whole + ([rest] if rest and ended else [])

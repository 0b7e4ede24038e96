"""A tar archive as the source of a build context: listed and read like a directory.

The archive lies uncompressed in a file that nobody else can change. Entries come in BuildKit's
order and with the modes that the same tree has as a directory, so a context is the same content
whichever way it is given.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import threading
from typing import TYPE_CHECKING, Self

from offload_client.context.dirscan import ModeTable
from offload_client.context.entries import TreeEntry
from offload_client.context.followpaths import include_patterns
from offload_client.context.hashing import changed
from offload_client.context.tartree import TarNode, find, read_tree, resolve
from offload_core.chunking import Chunker
from offload_core.chunklist import encode_chunks, is_chunked
from offload_core.errors import ContextError
from offload_core.patterns import PatternMatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from offload_client.context.source import ListedContent, Selection

_COPY_BYTES = 1 << 20


class TarSource:
    """The content of one archive; for several threads; closed by its owner."""

    def __init__(self, fd: int, *, normalise_modes: bool = True) -> None:
        """Read the headers of an archive.

        Args:
            fd: descriptor of an uncompressed archive; the source takes one of its own.
            normalise_modes: as in the scan of a directory.

        Raises:
            ContextError: the archive is damaged, or has an entry that cannot be part of a build
                context.
        """
        self._fd = os.dup(fd)
        self._modes = ModeTable(normalised=normalise_modes)
        self._chunk_lists: dict[bytes, bytes] = {}
        self._hashing = threading.Lock()
        try:
            with os.fdopen(os.dup(fd), "rb") as file:
                self._root = read_tree(file)
        except OSError as error:
            self.close()
            raise _unreadable(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the archive up; scans and readers that are open go on. Harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def scan(self, selection: Selection, *, warn: Callable[[str], None]) -> Iterator[TreeEntry]:
        """Return the selected entries, lazily, for a worker thread.

        Args:
            selection: BuildKit's patterns.
            warn: told nothing: an archive has no sockets.

        Raises:
            ContextError: a pattern is malformed, or the archive cannot be read.
        """
        del warn
        # BuildKit itself sees the whole of an archive, so nothing that it wants may be missed.
        wanted = include_patterns(
            _TreeLinks(self._root), list(selection.include), list(selection.follow), thorough=True
        )
        include = PatternMatcher(wanted) if wanted is not None else None
        exclude = PatternMatcher(selection.exclude) if selection.exclude else None
        return self._entries(include, exclude)

    def open(self) -> TarReader:
        """Return a reader for one thread."""
        return TarReader(os.dup(self._fd), self._root, self._chunk_lists)

    def read_file(self, path: str, limit: int) -> bytes | None:
        """Return the beginning of a file, links followed; None when there is none.

        Args:
            path: clean, relative to the root.
            limit: bytes to read at most.

        Raises:
            ContextError: the archive cannot be read.
        """
        node = resolve(self._root, path)
        if node is None or not stat.S_ISREG(node.mode):
            return None
        try:
            return _read(self._fd, node, 0, min(limit, node.size_bytes))
        except OSError as error:
            raise _unreadable(error) from error

    def _entries(
        self, include: PatternMatcher | None, exclude: PatternMatcher | None
    ) -> Iterator[TreeEntry]:
        first_names: dict[TarNode, str] = {}
        fd = os.dup(self._fd)
        try:
            with Chunker() as chunker:
                for path, node in walk(self._root, include, exclude):
                    first = path
                    if node.names > 1 and stat.S_ISREG(node.mode):
                        first = first_names.setdefault(node, path)
                    if first == path and stat.S_ISREG(node.mode) and node.sha256 is None:
                        node.sha256 = self._digest(fd, node, chunker)
                    yield self._entry(path, node, first)
        except OSError as error:
            raise _unreadable(error) from error
        finally:
            os.close(fd)

    def _entry(self, path: str, node: TarNode, first: str) -> TreeEntry:
        entry = TreeEntry(
            path,
            self._modes[node.mode],
            node.size_bytes,
            node.modified_at_ns,
            node.link,
            node.sha256,
            node.xattrs,
            *node.device,
        )
        if first != path:
            entry.link_name, entry.size_bytes, entry.sha256 = first, 0, None
        return entry

    def _digest(self, fd: int, node: TarNode, chunker: Chunker) -> bytes:
        if not is_chunked(node.size_bytes):
            return hashlib.sha256(_read(fd, node, 0, node.size_bytes)).digest()
        # The descriptors share one position.
        with self._hashing:
            if isinstance(node.data, int):
                cut = chunker.cut(fd, node.size_bytes, start=node.data)
            else:
                with tempfile.TemporaryFile() as whole:
                    _expand(fd, node, whole.fileno())
                    cut = chunker.cut(whole.fileno(), node.size_bytes)
        if cut.size_bytes != node.size_bytes:
            raise ContextError("the copy of the tar archive became shorter while it was read")
        chunk_list = encode_chunks(cut.chunks)
        digest = hashlib.sha256(chunk_list).digest()
        self._chunk_lists[digest] = chunk_list
        return digest


class TarReader:
    """Reads files of an archive; for one thread; a context manager."""

    def __init__(self, fd: int, root: TarNode, chunk_lists: dict[bytes, bytes]) -> None:
        """Take over a descriptor of the archive."""
        self._fd = fd
        self._root = root
        self._chunk_lists = chunk_lists

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
        """Give the archive up; harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, file: ListedContent) -> bytes:
        """Return a whole file.

        Raises:
            ContextChangedError: there is no such file.
        """
        return self.read_chunk(file, 0, file.size_bytes)

    def read_chunk(self, file: ListedContent, offset: int, size: int) -> bytes:
        """Return a part of a file.

        Raises:
            ContextChangedError: there is no such file.
        """
        node = find(self._root, file.path)
        if node is None or node.sha256 != file.sha256 or offset + size > node.size_bytes:
            raise changed(file.path, "the tar archive has another file there")
        try:
            data = _read(self._fd, node, offset, size)
        except OSError as error:
            raise changed(file.path, f"it cannot be read any more ({error.strerror})") from error
        if len(data) != size:
            raise changed(file.path, "the copy of the tar archive became shorter")
        return data

    def chunk_list(self, file: ListedContent) -> bytes:
        """Return the chunk list of a large file.

        Raises:
            ContextChangedError: there is no such file.
        """
        chunk_list = self._chunk_lists.get(file.sha256)
        if chunk_list is None:
            raise changed(file.path, "the tar archive has another file there")
        return chunk_list


class _TreeLinks:
    """The links of an archive, for followpaths."""

    def __init__(self, root: TarNode) -> None:
        self._root = root

    def link(self, path: str) -> str | None:
        node = self._node(path)
        return (node.link or None) if node is not None else None

    def names(self, directory: str) -> list[str]:
        node = self._node(directory)
        return sorted(node.children) if node is not None and node.children is not None else []

    def _node(self, path: str) -> TarNode | None:
        """Look a path up as lstat(2) does: all links but the last are followed."""
        parent, _, name = path.rpartition("/")
        folder = resolve(self._root, parent) if parent else self._root
        if not name:
            return folder
        return (folder.children or {}).get(name) if folder is not None else None


def walk(
    root: TarNode, include: PatternMatcher | None, exclude: PatternMatcher | None
) -> Iterator[tuple[str, TarNode]]:
    """Yield the selected paths in BuildKit's order, each wanted one after its parents."""
    # A level is the directories above that nothing was selected of yet, and what is left to do.
    unannounced: list[tuple[str, TarNode]] = []
    stack = [_Level("", root, 0, 0)]
    while stack:
        level = stack[-1]
        name = next(level.names, None)
        if name is None:
            stack.pop()
            if unannounced and unannounced[-1][1] is level.node:
                unannounced.pop()
            continue
        node = level.children[name]
        path = f"{level.path}/{name}" if level.path else name
        is_directory = node.children is not None
        wanted = entered = True
        include_state = exclude_state = 0
        if include is not None:
            wanted, include_state = include.match_child(path, level.include_state)
            entered = wanted or (is_directory and not include.prunable(path, False))
        if exclude is not None and entered:
            out, exclude_state = exclude.match_child(path, level.exclude_state)
            if out:
                wanted = False
                entered = is_directory and not exclude.prunable(path, True)
        if wanted:
            yield from unannounced
            unannounced.clear()
            yield path, node
        if is_directory and entered:
            if not wanted:
                unannounced.append((path, node))
            stack.append(_Level(path, node, include_state, exclude_state))


class _Level:
    __slots__ = ("children", "exclude_state", "include_state", "names", "node", "path")

    def __init__(self, path: str, node: TarNode, include_state: int, exclude_state: int) -> None:
        self.path = path
        self.node = node
        self.children = node.children or {}
        # Python's order of text is that of its UTF-8 bytes.
        self.names = iter(sorted(self.children))
        self.include_state = include_state
        self.exclude_state = exclude_state


def _read(fd: int, node: TarNode, offset: int, size: int) -> bytes:
    if isinstance(node.data, int):
        return _read_exactly(fd, node.data + offset, size)
    data = bytearray(size)
    for at, length, position in node.data:
        begin, end = max(at, offset), min(at + length, offset + size)
        if begin < end:
            part = _read_exactly(fd, position + begin - at, end - begin)
            data[begin - offset : begin - offset + len(part)] = part
    return bytes(data)


def _read_exactly(fd: int, position: int, size: int) -> bytes:
    data = os.pread(fd, size, position)
    while len(data) < size:
        more = os.pread(fd, size - len(data), position + len(data))
        if not more:
            break
        data += more
    return data


def _expand(fd: int, node: TarNode, target: int) -> None:
    """Write a sparse file as it was before it was archived."""
    os.ftruncate(target, node.size_bytes)
    if isinstance(node.data, int):
        return
    for at, length, position in node.data:
        for done in range(0, length, _COPY_BYTES):
            data = _read_exactly(fd, position + done, min(_COPY_BYTES, length - done))
            os.pwrite(target, data, at + done)


def _unreadable(error: OSError) -> ContextError:
    return ContextError(f"cannot read the copy of the tar archive: {error.strerror or error}")

"""Lists a build context: what BuildKit asks for, in BuildKit's order, with digests.

The order is that of fsutil: names sorted as bytes in each directory, a directory directly
followed by what is below it, parents of a wanted entry just before it. Excluded directories are
not entered unless something in them could be wanted.
Source: fsutil's NewFilterFS, mkstat and WithHardlinkReset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.context.contextroot import open_root
from offload_client.context.digests import DigestSource
from offload_client.context.dirscan import (
    ALL_WANTED,
    DirectoryScanner,
    FoundDirectory,
    FoundItem,
    LinkedFile,
    ModeTable,
    utf8,
)
from offload_client.context.entries import NO_XATTRS, ContextItem, TreeEntry
from offload_client.context.followpaths import include_patterns
from offload_client.context.hashing import read_xattrs, shown, unreadable
from offload_core.patterns import PatternMatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping, Sequence
    from pathlib import Path

    from offload_client.context.statindex import StatIndex
    from offload_core.rootdir import RootDirectory


def scan_context(
    root: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow: Sequence[str] = (),
    index: StatIndex | None = None,
    chunk_lists: MutableMapping[bytes, bytes] | None = None,
    normalise_modes: bool = True,
    warn: Callable[[str], None],
) -> Iterator[ContextItem]:
    """Return the entries of a build context, lazily.

    Runs in one worker thread: it reads directories and files. What was hashed is saved in the
    index at the end, also when the iteration is given up.

    Args:
        root: root of the context.
        include: BuildKit's include patterns; empty for all.
        exclude: BuildKit's exclude patterns, in the syntax of .dockerignore.
        follow: BuildKit's followpaths: only these, and what their links lead to; empty for all.
        index: digests of former scans; None reads every file.
        chunk_lists: receives the chunk lists of the large files that were read, by their digest.
        normalise_modes: files become 0755 when their owner may execute them, else 0644, and
            directories 0755, so that a umask does not change cache keys. The setuid, setgid and
            sticky bits of files stay, as they are content.
        warn: told one sentence about what is left out.

    Raises:
        ContextError: a pattern is malformed, or the context cannot be read; the latter and
            `ContextChangedError`, a file changes all the time, come during the iteration.
    """
    directory = open_root(root)
    try:
        wanted = include_patterns(directory.path, list(include), list(follow))
        scan = _Scan(
            directory,
            include=PatternMatcher(wanted) if wanted is not None else None,
            exclude=PatternMatcher(exclude) if exclude else None,
            digests=DigestSource(index, chunk_lists),
            modes=ModeTable(normalised=normalise_modes),
        )
    except BaseException:
        directory.close()
        raise
    return scan.items(warn)


class _Scan:
    def __init__(
        self,
        root: RootDirectory,
        *,
        include: PatternMatcher | None,
        exclude: PatternMatcher | None,
        digests: DigestSource,
        modes: ModeTable,
    ) -> None:
        self._root = root
        self._digests = digests
        self._modes = modes
        self._scanner = DirectoryScanner(
            root, include=include, exclude=exclude, digests=digests, modes=modes
        )
        self._first_names: dict[int, str] = {}

    def items(self, warn: Callable[[str], None]) -> Iterator[ContextItem]:
        with self._root, self._digests:
            yield from self._walk()
        sockets = self._scanner.sockets
        if sockets:
            more = f" and {len(sockets) - 1} more" if len(sockets) > 1 else ""
            warn(
                f'the socket "{shown(sockets[0])}"{more} cannot be part of a build context '
                "and is left out"
            )

    def _walk(self) -> Iterator[ContextItem]:
        top = FoundDirectory("", self._root.status(), ALL_WANTED)
        stack = [(top, self._read(top))]
        unannounced: list[FoundDirectory] = []
        while stack:
            directory, items = stack[-1]
            if not items:
                stack.pop()
                if unannounced and unannounced[-1] is directory:
                    unannounced.pop()
                continue
            item = items.pop()
            if isinstance(item, FoundDirectory):
                if item.verdict.wanted:
                    yield from map(self._directory_entry, unannounced)
                    unannounced.clear()
                    yield self._directory_entry(item)
                else:
                    unannounced.append(item)
                stack.append((item, self._read(item)))
                continue
            if unannounced:
                yield from map(self._directory_entry, unannounced)
                unannounced.clear()
            yield self._settle_link(item) if isinstance(item, LinkedFile) else item

    def _read(self, directory: FoundDirectory) -> list[FoundItem]:
        """Return what is in a directory, last name first, so that it is freed as it is used."""
        if not directory.verdict.entered:
            return []
        items = self._scanner.read(directory)
        items.reverse()
        return items

    def _settle_link(self, linked: LinkedFile) -> TreeEntry:
        entry = linked.entry
        first = self._first_names.setdefault(linked.inode, entry.path)
        if first != entry.path:
            entry.link_name, entry.size_bytes, entry.sha256 = first, 0, None
        return entry

    def _directory_entry(self, directory: FoundDirectory) -> TreeEntry:
        path = utf8(directory.path, "name")
        try:
            xattrs = read_xattrs(self._root.absolute(path))
        except FileNotFoundError:
            xattrs = NO_XATTRS
        except OSError as error:
            raise unreadable(path, error) from error
        status = directory.status
        mode = self._modes[status.st_mode]
        return TreeEntry(path, mode, 0, status.st_mtime_ns, "", None, xattrs)

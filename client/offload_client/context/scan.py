"""Lists a build context: what BuildKit asks for, in BuildKit's order, with digests.

The order is that of fsutil: names sorted as bytes in each directory, a directory directly
followed by what is below it, parents of a wanted entry just before it. Excluded directories are
not entered unless something in them could be wanted.
Source: fsutil's NewFilterFS, mkstat and WithHardlinkReset.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.context.digests import DigestSource, ListedFile
from offload_client.context.entries import NO_XATTRS, TreeEntry
from offload_client.context.followpaths import include_patterns
from offload_client.context.hashing import changed, read_xattrs, shown, unreadable
from offload_client.context.patterns import PatternMatcher
from offload_client.context.rootdir import RootDirectory
from offload_core.errors import ContextError
from offload_core.filemode import go_file_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from offload_client.context.statindex import StatIndex

__all__ = ["TreeEntry", "scan_context"]

_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


def scan_context(
    root: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow: Sequence[str] = (),
    index: StatIndex | None = None,
    normalise_modes: bool = True,
    warn: Callable[[str], None],
) -> Iterator[TreeEntry]:
    """Return the entries of a build context, lazily.

    Runs in one worker thread: it reads directories and files. What was hashed is saved in the
    index at the end, also when the iteration is given up.

    Args:
        root: root of the context.
        include: BuildKit's include patterns; empty for all.
        exclude: BuildKit's exclude patterns, in the syntax of .dockerignore.
        follow: BuildKit's followpaths: only these, and what their links lead to; empty for all.
        index: digests of former scans; None reads every file.
        normalise_modes: files become 0755 when their owner may execute them, else 0644, and
            directories 0755, so that a umask does not change cache keys. The setuid, setgid and
            sticky bits of files stay, as they are content.
        warn: told one sentence about what is left out.

    Raises:
        ContextError: a pattern is malformed, or the context cannot be read; the latter and
            `ContextChangedError`, a file changes all the time, come during the iteration.
    """
    directory = RootDirectory(root)
    try:
        wanted = include_patterns(directory.path, list(include), list(follow))
        scan = _Scan(
            directory,
            include=PatternMatcher(wanted) if wanted is not None else None,
            exclude=PatternMatcher(exclude) if exclude else None,
            index=index,
            normalise_modes=normalise_modes,
            warn=warn,
        )
    except BaseException:
        directory.close()
        raise
    return scan.entries()


@dataclass(slots=True)
class _Directory:
    path: str
    status: os.stat_result
    include_state: int
    exclude_state: int
    wanted: bool
    entered: bool


@dataclass(slots=True)
class _Linked:
    """A file with several names; which of them is the file is known when it is its turn."""

    entry: TreeEntry
    inode: tuple[int, int]


_Item = TreeEntry | _Directory | _Linked


class _Scan:
    def __init__(
        self,
        root: RootDirectory,
        *,
        include: PatternMatcher | None,
        exclude: PatternMatcher | None,
        index: StatIndex | None,
        normalise_modes: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._root = root
        self._include = include
        self._exclude = exclude
        self._index = index
        self._normalise = normalise_modes
        self._warn = warn
        self._digests = DigestSource(index)
        self._modes: dict[int, int] = {}
        self._first_names: dict[tuple[int, int], str] = {}
        self._sockets: list[str] = []

    def entries(self) -> Iterator[TreeEntry]:
        with self._root:
            try:
                yield from self._walk()
            finally:
                if self._index is not None:
                    self._index.save()
        if self._sockets:
            count = len(self._sockets)
            more = f" and {count - 1} more" if count > 1 else ""
            self._warn(
                f'the socket "{shown(self._sockets[0])}"{more} cannot be part of a build context '
                "and is left out"
            )

    def _walk(self) -> Iterator[TreeEntry]:
        top = _Directory("", self._root.status(), 0, 0, wanted=True, entered=True)
        stack: list[tuple[_Directory, Iterator[_Item]]] = [(top, iter(self._list(top)))]
        unannounced: list[_Directory] = []
        while stack:
            directory, items = stack[-1]
            item = next(items, None)
            if item is None:
                stack.pop()
                if unannounced and unannounced[-1] is directory:
                    unannounced.pop()
                continue
            if isinstance(item, _Directory):
                if item.wanted:
                    yield from map(self._directory_entry, unannounced)
                    unannounced.clear()
                    yield self._directory_entry(item)
                else:
                    unannounced.append(item)
                stack.append((item, iter(self._list(item) if item.entered else ())))
                continue
            if unannounced:
                yield from map(self._directory_entry, unannounced)
                unannounced.clear()
            yield self._settle_link(item) if isinstance(item, _Linked) else item

    def _list(self, directory: _Directory) -> list[_Item]:
        """Read one directory and all wanted files in it, so that only one is open at a time."""
        try:
            fd = self._root.open_directory(directory.path)
        except (FileNotFoundError, NotADirectoryError):
            # Gone since its parent was listed; what is not there is not part of the context.
            return []
        except OSError as error:
            if not directory.wanted and isinstance(error, PermissionError):
                return []
            raise unreadable(directory.path, error) from error
        try:
            with os.scandir(fd) as listing:
                # Python's order of text is that of its UTF-8 bytes; other names end the scan.
                found = sorted(listing, key=lambda item: item.name)
            return self._select(directory, fd, found)
        except OSError as error:
            raise unreadable(directory.path, error) from error
        finally:
            os.close(fd)

    def _select(self, directory: _Directory, fd: int, found: list[os.DirEntry[str]]) -> list[_Item]:
        include, exclude = self._include, self._exclude
        prefix = f"{directory.path}/" if directory.path else ""
        items: list[_Item | None] = []
        files: list[ListedFile] = []
        places: list[int] = []
        for item in found:
            path = prefix + item.name
            wanted = entered = True
            include_state = exclude_state = 0
            is_directory = item.is_dir(follow_symlinks=False)
            if include is not None:
                wanted, include_state = include.match_child(path, directory.include_state)
                entered = wanted or (is_directory and not include.prunable(path, False))
            if exclude is not None and entered:
                out, exclude_state = exclude.match_child(path, directory.exclude_state)
                if out:
                    wanted = False
                    entered = is_directory and not exclude.prunable(path, True)
            if not (entered if is_directory else wanted):
                continue
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if is_directory:
                items.append(
                    _Directory(path, status, include_state, exclude_state, wanted, entered)
                )
            elif stat.S_ISREG(status.st_mode):
                places.append(len(items))
                files.append(ListedFile(item.name, status))
                items.append(None)
            elif stat.S_ISSOCK(status.st_mode):
                self._sockets.append(path)
            else:
                items.append(self._other_entry(fd, item.name, path, status))
        if files:
            names = {item.name for item in found}
            entries = self._file_entries(directory.path, fd, files, names)
            for place, entry in zip(places, entries, strict=True):
                items[place] = entry
        return [item for item in items if item is not None]

    def _file_entries(
        self, directory: str, fd: int, files: list[ListedFile], names: set[str]
    ) -> Iterator[_Item | None]:
        """Yield the entry of each file in order; None for one that is gone."""
        prefix = f"{directory}/" if directory else ""
        for listed, known in zip(files, self._digests.of(directory, fd, files, names), strict=True):
            if known is None:
                yield None
                continue
            status, file = known
            entry = TreeEntry(
                _text(prefix + listed.name, "name"),
                self._mode(status.st_mode),
                status.st_size,
                status.st_mtime_ns,
                "",
                file.sha256,
                file.xattrs or NO_XATTRS,
            )
            if status.st_nlink > 1:
                yield _Linked(entry, (status.st_dev, status.st_ino))
            else:
                yield entry

    def _settle_link(self, linked: _Linked) -> TreeEntry:
        entry = linked.entry
        first = self._first_names.setdefault(linked.inode, entry.path)
        if first != entry.path:
            entry.link_name, entry.size_bytes, entry.sha256 = first, 0, None
        return entry

    def _directory_entry(self, directory: _Directory) -> TreeEntry:
        path = _text(directory.path, "name")
        try:
            xattrs = read_xattrs(self._root.absolute(path))
        except FileNotFoundError:
            xattrs = NO_XATTRS
        except OSError as error:
            raise unreadable(path, error) from error
        status = directory.status
        return TreeEntry(path, self._mode(status.st_mode), 0, status.st_mtime_ns, "", None, xattrs)

    def _other_entry(self, fd: int, name: str, path: str, status: os.stat_result) -> TreeEntry:
        """Describe a symbolic link, named pipe or device; none of them is opened."""
        entry = TreeEntry(_text(path, "name"), self._mode(status.st_mode), 0, status.st_mtime_ns)
        if stat.S_ISLNK(status.st_mode):
            try:
                target = os.readlink(name, dir_fd=fd)
            except OSError as error:
                raise changed(path, "it is no symbolic link any more") from error
            entry.link_name = _text(target, f'link target of "{entry.path}"')
        elif stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            entry.device_major = os.major(status.st_rdev)
            entry.device_minor = os.minor(status.st_rdev)
        return entry

    def _mode(self, st_mode: int) -> int:
        mode = self._modes.get(st_mode)
        if mode is None:
            mode = go_file_mode(_normal(st_mode) if self._normalise else st_mode)
            self._modes[st_mode] = mode
        return mode


def _normal(st_mode: int) -> int:
    kind = stat.S_IFMT(st_mode)
    if kind == stat.S_IFDIR:
        return kind | 0o755
    if kind == stat.S_IFREG:
        return kind | (st_mode & _SPECIAL_BITS) | (0o755 if st_mode & stat.S_IXUSR else 0o644)
    if kind == stat.S_IFIFO:
        return kind | 0o644
    return st_mode


def _text(name: str, what: str) -> str:
    """Return a name that is certainly UTF-8.

    Raises:
        ContextError: it is not; the protocol has no other names.
    """
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ContextError(
                f'the {what} "{shown(name)}" in the build context is not UTF-8',
                hint="rename it, or list it in .dockerignore (a * stands for the odd bytes)",
            ) from error
    return name

"""Reads one directory of a build context: what the patterns want of it, with digests.

Names are sorted as bytes, as in fsutil. Ordinary files are handled in columns, since an object
for each of them would double the time of a scan.
"""

from __future__ import annotations

import os
import stat
from array import array
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from offload_client.context.entries import NO_XATTRS, ContextItem, FileRun, TreeEntry
from offload_client.context.hashing import changed, shown, unreadable
from offload_core.errors import ContextError
from offload_core.filemode import go_file_mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.context.digests import DigestSource, DirectoryDigests
    from offload_core.patterns import PatternMatcher
    from offload_core.rootdir import RootDirectory

_KIND = 0o170000
"""The bits of st_mode that S_IFMT gives."""
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_BATCH_ENTRIES = 2048
"""Taken together. Bounds memory: Python's status of a file takes 700 bytes."""


class Verdict(NamedTuple):
    """What the patterns say about an entry.

    Attributes:
        include_state: of the include patterns, for what is below.
        exclude_state: of the exclude patterns, likewise.
        wanted: it is part of the context.
        entered: it is wanted, or a directory in which something could be.
    """

    include_state: int
    exclude_state: int
    wanted: bool
    entered: bool


ALL_WANTED = Verdict(0, 0, wanted=True, entered=True)


@dataclass(slots=True)
class FoundDirectory:
    """A directory that was not read yet."""

    path: str
    status: os.stat_result
    verdict: Verdict


@dataclass(slots=True)
class LinkedFile:
    """A file with several names; which of them is the file is known when it is its turn."""

    entry: TreeEntry
    inode: int


FoundItem: TypeAlias = ContextItem | FoundDirectory | LinkedFile


class ModeTable(dict[int, int]):
    """Go's encoding of each st_mode, made when it is first asked for."""

    def __init__(self, *, normalised: bool) -> None:
        """Begin an empty table.

        Args:
            normalised: see `scan_context`.
        """
        self._normalised = normalised

    def __missing__(self, st_mode: int) -> int:
        mode = go_file_mode(_normal(st_mode) if self._normalised else st_mode)
        self[st_mode] = mode
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


class DirectoryScanner:
    """Reads directories, one at a time."""

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
        self._include = include
        self._exclude = exclude
        self._filtered = include is not None or exclude is not None
        self._digests = digests
        self._modes = modes
        self.sockets: list[str] = []
        """Paths of sockets that were wanted; they are left out."""

    def read(self, directory: FoundDirectory) -> list[FoundItem]:
        """Return what is wanted in a directory, in order; files with their digests.

        Nothing stays open.

        Raises:
            ContextError: it cannot be read, or a name in it is not UTF-8.
            ContextChangedError: a file changes all the time.
        """
        try:
            fd = self._root.open_directory(directory.path)
        except (FileNotFoundError, NotADirectoryError):
            # Gone since its parent was listed; what is not there is not part of the context.
            return []
        except OSError as error:
            if not directory.verdict.wanted and isinstance(error, PermissionError):
                return []
            raise unreadable(directory.path, error) from error
        try:
            return self._read(directory, fd)
        except OSError as error:
            raise unreadable(directory.path, error) from error
        finally:
            os.close(fd)

    def _read(self, directory: FoundDirectory, fd: int) -> list[FoundItem]:
        with os.scandir(fd) as listing:
            # Python's order of text is that of its UTF-8 bytes; other names end the scan.
            found = sorted(listing, key=attrgetter("name"), reverse=True)
        names = [item.name for item in found]
        digests = self._digests.directory(directory.path, fd)
        items: list[FoundItem] = []
        while found:
            # Each keeps the status that it was asked for, so they must go soon.
            batch = found[: -_BATCH_ENTRIES - 1 : -1]
            del found[-_BATCH_ENTRIES:]
            items += self._read_batch(directory, fd, batch, digests)
        digests.finish(names)
        return items

    def _read_batch(
        self,
        directory: FoundDirectory,
        fd: int,
        found: list[os.DirEntry[str]],
        digests: DirectoryDigests,
    ) -> list[FoundItem]:
        prefix = f"{directory.path}/" if directory.path else ""
        files = _Files(prefix, self._modes)
        names, statuses = files.names, files.statuses
        others: list[tuple[int, FoundItem]] = []
        verdict = ALL_WANTED
        filtered = self._filtered
        for item in found:
            if filtered:
                verdict = self._judge(directory, prefix + item.name, item)
                if not verdict.entered:
                    continue
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            # This loop is most of a scan, so S_ISREG is written out.
            if status.st_mode & _KIND == stat.S_IFREG and verdict.wanted:
                names.append(item.name)
                statuses.append(status)
            else:
                other = self._other(fd, prefix + item.name, status, verdict)
                if other is not None:
                    others.append((len(names), other))
        if not names:
            return [item for _, item in others]
        return files.items(digests, others)

    def _judge(self, directory: FoundDirectory, path: str, item: os.DirEntry[str]) -> Verdict:
        wanted = entered = True
        include_state = exclude_state = 0
        above = directory.verdict
        if self._include is not None:
            wanted, include_state = self._include.match_child(path, above.include_state)
            entered = wanted or (_is_directory(item) and not self._include.prunable(path, False))
        if self._exclude is not None and entered:
            out, exclude_state = self._exclude.match_child(path, above.exclude_state)
            if out:
                wanted = False
                entered = _is_directory(item) and not self._exclude.prunable(path, True)
        if wanted and not (include_state or exclude_state):
            return ALL_WANTED
        return Verdict(include_state, exclude_state, wanted, entered)

    def _other(
        self, fd: int, path: str, status: os.stat_result, verdict: Verdict
    ) -> FoundItem | None:
        """Describe what is no regular file; nothing but directories will be opened."""
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            return FoundDirectory(path, status, verdict)
        if not verdict.wanted:
            # It was a directory when it was listed.
            return None
        if stat.S_ISSOCK(mode):
            self.sockets.append(path)
            return None
        entry = TreeEntry(utf8(path, "name"), self._modes[mode], 0, status.st_mtime_ns)
        if stat.S_ISLNK(mode):
            try:
                target = os.readlink(path.rpartition("/")[2], dir_fd=fd)
            except OSError as error:
                raise changed(path, "it is no symbolic link any more") from error
            entry.link_name = utf8(target, f'link target of "{entry.path}"')
        elif stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            entry.device_major = os.major(status.st_rdev)
            entry.device_minor = os.minor(status.st_rdev)
        return entry


def _is_directory(item: os.DirEntry[str]) -> bool:
    return item.is_dir(follow_symlinks=False)


class _Files:
    """The regular files among some neighbours in a directory."""

    def __init__(self, prefix: str, modes: ModeTable) -> None:
        self.names: list[str] = []
        self.statuses: list[os.stat_result] = []
        self._prefix = prefix
        self._modes = modes
        self._digests: list[bytes | None] = []

    def items(
        self, digests: DirectoryDigests, others: list[tuple[int, FoundItem]]
    ) -> list[FoundItem]:
        """Return the files in runs, and the others in their places among them.

        Args:
            digests: of the directory.
            others: each with the number of files before it.
        """
        if not "".join(self.names).isascii():
            for name in self.names:
                utf8(self._prefix + name, "name")
        self._digests, xattrs = digests.find(self.names, self.statuses)
        breaks: list[tuple[int, int, FoundItem | None]] = []
        breaks += [(place, 0, item) for place, item in others]
        breaks += [
            (number, 1, self._single(number, xattrs.get(self.names[number])))
            for number in self._singles(xattrs)
        ]
        breaks.sort(key=lambda found: found[:2])
        items: list[FoundItem] = []
        start = 0
        for place, length, item in breaks:
            if start < place:
                items.append(self._run(start, place))
            if item is not None:
                items.append(item)
            start = place + length
        if start < len(self.names):
            items.append(self._run(start, len(self.names)))
        return items

    def _singles(self, xattrs: Mapping[str, object]) -> list[int]:
        """Return the numbers of files that need more words than a run has."""
        linked = [status.st_nlink for status in self.statuses]
        if not xattrs and None not in self._digests and max(linked) <= 1:
            return []
        return [
            number
            for number, digest in enumerate(self._digests)
            if digest is None or linked[number] > 1 or self.names[number] in xattrs
        ]

    def _single(self, number: int, xattrs: Mapping[str, bytes] | None) -> FoundItem | None:
        """Return an entry of its own; None for a file that is gone."""
        status, digest = self.statuses[number], self._digests[number]
        if digest is None:
            return None
        entry = TreeEntry(
            self._prefix + self.names[number],
            self._modes[status.st_mode],
            status.st_size,
            status.st_mtime_ns,
            "",
            digest,
            xattrs or NO_XATTRS,
        )
        if status.st_nlink > 1:
            return LinkedFile(entry, status.st_dev << 64 | status.st_ino)
        return entry

    def _run(self, start: int, stop: int) -> FileRun:
        statuses = self.statuses[start:stop]
        modes = self._modes
        return FileRun(
            self._prefix,
            self.names[start:stop],
            [modes[status.st_mode] for status in statuses],
            array("Q", [status.st_size for status in statuses]),
            array("q", [status.st_mtime_ns for status in statuses]),
            b"".join([digest for digest in self._digests[start:stop] if digest is not None]),
        )


def utf8(name: str, what: str) -> str:
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

"""Turns BuildKit's followpaths into include patterns, with symbolic links followed.

`COPY a* b/` makes BuildKit ask for the paths `a*` and `b`, and for what their links lead to, so
that the context has it. Source: fsutil's FollowLinks and the include part of its NewFilterFS.
Links are followed as if the root of the context were the root of the file system.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from pathlib import Path
from typing import Protocol

from offload_core.errors import ContextError
from offload_core.goglob import clean_path, join_path, match_name

_MAX_RESTS = 1000
"""So many paths are followed through one link."""


class LinkView(Protocol):
    """Names and links of a tree; paths are relative to its root, "" for the root itself."""

    def link(self, path: str) -> str | None:
        """Return the target of a symbolic link; None for anything else, also for nothing.

        Raises:
            ContextError: it cannot be read.
        """
        ...

    def names(self, directory: str) -> list[str]:
        """Return the sorted names in a directory; none where there is no directory.

        Raises:
            ContextError: it cannot be read.
        """
        ...


class DirectoryLinks:
    """The `LinkView` of a directory of this machine."""

    def __init__(self, root: str) -> None:
        """Look below `root`, a resolved path."""
        self._root = root

    def link(self, path: str) -> str | None:
        """Return the target of a symbolic link."""
        absolute = f"{self._root}/{path}"
        try:
            if not stat.S_ISLNK(os.lstat(absolute).st_mode):
                return None
            return str(Path(absolute).readlink())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(path, error) from error

    def names(self, directory: str) -> list[str]:
        """Return the sorted names in a directory."""
        try:
            with os.scandir(f"{self._root}/{directory}") as listing:
                return sorted(item.name for item in listing)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(directory or ".", error) from error


def include_patterns(
    root: str | LinkView, include: list[str], follow: list[str], *, thorough: bool = False
) -> list[str] | None:
    """Return the include patterns of a request; None when everything is wanted.

    Args:
        root: resolved path of the context's root, or a view of another kind of tree.
        include: the request's include patterns.
        follow: the request's followpaths.
        thorough: see `follow_links`.

    Raises:
        ContextError: a link or directory on the way cannot be read.
    """
    patterns: list[str] | None = list(include)
    if follow and (targets := follow_links(root, follow, thorough=thorough)) is not None:
        patterns = _without_covered([*include, *targets])
    return patterns or None


def follow_links(
    root: str | LinkView, paths: list[str], *, thorough: bool = False
) -> list[str] | None:
    """Return the paths and all they lead to, sorted; None when the root itself is among them.

    Args:
        root: resolved path of the context's root, or a view of another kind of tree.
        paths: relative paths; elements may have wildcards.
        thorough: fsutil does not go on behind a link that another path has led to, and so misses
            what is below it. True finds that as well.

    Raises:
        ContextError: a link or directory on the way cannot be read.
    """
    view = DirectoryLinks(root) if isinstance(root, str) else root
    resolver = _ThoroughResolver(view) if thorough else _Resolver(view)
    for path in paths:
        resolver.add(path)
    return _without_covered(sorted(resolver.resolved))


def _without_covered(paths: list[str]) -> list[str] | None:
    kept: list[str] = []
    last = ""
    for path in paths:
        if path == ".":
            return None
        # With nothing kept yet this drops absolute paths, as fsutil does; they match nothing.
        if not path.startswith(f"{last}/"):
            kept.append(path)
            last = path
    return kept


class _Resolver:
    def __init__(self, view: LinkView) -> None:
        self._view = view
        self.resolved: set[str] = set()

    def add(self, path: str) -> None:
        """Walk down one path; a link on the way sends us to its target with what is left."""
        waiting = [path]
        while waiting:
            current, left = ".", join_path(".", waiting.pop())
            while True:
                element, _, left = left.partition("/")
                current = join_path(current, element)
                targets = self._targets(current, wildcards=True)
                if (not left or targets) and self._is_known(current, left):
                    break
                if targets:
                    self.resolved.add(current)
                    waiting += [join_path(target, left) for target in reversed(targets)]
                    break
                if not left:
                    self.resolved.add(current)
                    break

    def _is_known(self, path: str, left: str) -> bool:
        """Return whether nothing new can come from a link, or the end of a path."""
        del left
        return path in self.resolved

    def _targets(self, path: str, *, wildcards: bool) -> list[str]:
        """Return where links of this name lead, as absolute paths below the root."""
        if path == "." or path == ".." or path.startswith("../"):
            # Nothing outside the root is looked at.
            return []
        parent, _, name = path.rpartition("/")
        if wildcards and _has_wildcards(name):
            return [
                target
                for found in self._view.names(parent)
                if match_name(name, found)
                for target in self._targets(join_path(parent, found), wildcards=False)
            ]
        found_link = self._view.link(path)
        if found_link is None:
            return []
        link = clean_path(found_link)
        return [link if link.startswith("/") else join_path("/", parent, link)]


class _ThoroughResolver(_Resolver):
    def __init__(self, view: LinkView) -> None:
        super().__init__(view)
        self._met: set[tuple[str, str]] = set()
        self._rests: Counter[str] = Counter()

    def _is_known(self, path: str, left: str) -> bool:
        if (path, left) in self._met:
            return True
        self._met.add((path, left))
        # A link to something below itself leads to ever longer paths.
        self._rests[path] += 1
        return self._rests[path] > _MAX_RESTS


def _has_wildcards(name: str) -> bool:
    escaped = False
    for char in name:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char in "*?[":
            return True
    return False


def _unreadable(path: str, error: OSError) -> ContextError:
    return ContextError(f'cannot look up "{path}" in the build context: {error.strerror}')

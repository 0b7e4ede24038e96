"""Turns BuildKit's followpaths into include patterns, with symbolic links followed.

`COPY a* b/` makes BuildKit ask for the paths `a*` and `b`, and for what their links lead to, so
that the context has it. Source: fsutil's FollowLinks and the include part of its NewFilterFS.
Links are followed as if the root of the context were the root of the file system.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from offload_client.context.goglob import clean_path, join_path, match_name
from offload_core.errors import ContextError


def include_patterns(root: str, include: list[str], follow: list[str]) -> list[str] | None:
    """Return the include patterns of a request; None when everything is wanted.

    Args:
        root: resolved path of the context's root.
        include: the request's include patterns.
        follow: the request's followpaths.

    Raises:
        ContextError: a link or directory on the way cannot be read.
    """
    patterns: list[str] | None = list(include)
    if follow and (targets := follow_links(root, follow)) is not None:
        patterns = _without_covered([*include, *targets])
    return patterns or None


def follow_links(root: str, paths: list[str]) -> list[str] | None:
    """Return the paths and all they lead to, sorted; None when the root itself is among them.

    Args:
        root: resolved path of the context's root.
        paths: relative paths; elements may have wildcards.

    Raises:
        ContextError: a link or directory on the way cannot be read.
    """
    resolver = _Resolver(root)
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
    def __init__(self, root: str) -> None:
        self._root = root
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
                if (not left or targets) and current in self.resolved:
                    break
                if targets:
                    self.resolved.add(current)
                    waiting += [join_path(target, left) for target in reversed(targets)]
                    break
                if not left:
                    self.resolved.add(current)
                    break

    def _targets(self, path: str, *, wildcards: bool) -> list[str]:
        """Return where links of this name lead, as absolute paths below the root."""
        if path == "." or path == ".." or path.startswith("../"):
            # Nothing outside the root is looked at.
            return []
        parent, _, name = path.rpartition("/")
        if wildcards and _has_wildcards(name):
            return [
                target
                for found in self._names(parent)
                if match_name(name, found)
                for target in self._targets(join_path(parent, found), wildcards=False)
            ]
        absolute = f"{self._root}/{path}"
        try:
            if not stat.S_ISLNK(os.lstat(absolute).st_mode):
                return []
            link = clean_path(str(Path(absolute).readlink()))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(path, error) from error
        return [link if link.startswith("/") else join_path("/", parent, link)]

    def _names(self, directory: str) -> list[str]:
        try:
            with os.scandir(f"{self._root}/{directory}") as listing:
                return sorted(item.name for item in listing)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(directory or ".", error) from error


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

"""Walks through control groups that somebody else has made, however many and however deep.

A step with `security.insecure` makes groups below its own, as deep as it wants. So nothing here
calls itself for a level, holds a file open for each, or names a group by its whole path.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_GROUP = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def each_group(root: Path) -> Iterator[int]:
    """Yield a descriptor of each group, those below before the one above; none for no group.

    It is open until the next one is asked for. Groups that come and go meanwhile may be left out.
    """
    for group, _ in _walk(root):
        yield group


def processes_of(group: int) -> list[int]:
    """Return the processes of a group, not those of groups below.

    Raises:
        OSError: it is gone.
    """
    file = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=group)
    with os.fdopen(file, encoding="ascii") as opened:
        return [int(word) for word in opened.read().split()]


def remove_groups(root: Path) -> bool:
    """Remove a group and all below it; return whether nothing is left, as nothing runs in it."""
    for group, names in _walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=group)
    try:
        root.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _walk(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield a descriptor of each group, and the names of those below it, which came before."""
    try:
        group = os.open(root, _GROUP)
    except OSError:
        return
    try:
        levels = [(_below(group), 0)]
        while levels:
            names, done = levels.pop()
            if done < len(names):
                levels.append((names, done + 1))
                try:
                    below = os.open(names[done], _GROUP, dir_fd=group)
                except OSError:
                    continue
                os.close(group)
                group = below
                levels.append((_below(group), 0))
                continue
            yield group, names
            if levels:
                above = os.open("..", _GROUP, dir_fd=group)
                os.close(group)
                group = above
    except OSError:
        # It was removed while we were in it; whoever needs to be sure asks again.
        return
    finally:
        os.close(group)


def _below(group: int) -> list[str]:
    with os.scandir(group) as listed:
        return [item.name for item in listed if item.is_dir(follow_symlinks=False)]

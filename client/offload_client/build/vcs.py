"""Branch and revision of a build context, read from `.git` without starting git.

Source: gitrepository-layout(5): HEAD is a symbolic ref or a revision, `.git` may be a file that
points elsewhere (worktrees), refs are loose files or lines of packed-refs.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 16 << 20
_REVISION = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def branch_and_revision(directory: Path) -> tuple[str, str]:
    """Return branch and commit; empty texts for what is not known. Never fails."""
    try:
        folder = directory.resolve()
        for parent in (folder, *folder.parents):
            git = parent / ".git"
            if git.exists():
                branch, revision = _read(git)
                # Only what is one travels: a crafted repository could point at any other file.
                return branch, revision if _REVISION.fullmatch(revision) else ""
    except (OSError, RuntimeError, ValueError):
        # ValueError: no UTF-8. RuntimeError: links in a circle.
        pass
    return "", ""


def in_repository(directory: Path) -> bool:
    """Return whether a directory belongs to a git repository. Never fails."""
    try:
        return _repository(directory.resolve()) is not None
    except (OSError, RuntimeError, ValueError):
        return False


def build_definition(root: Path, dockerfile: Path) -> str:
    """Return a name for a build that is the same in every checkout of its repository.

    Paths of context and Dockerfile below the root of the repository; outside of one, the name of
    the context's directory and the Dockerfile's path below it.
    """
    try:
        folder, file = root.resolve(), dockerfile.resolve()
        base = _repository(folder)
        if base is None:
            base = folder.parent
        paths = "\0".join(os.path.relpath(path, base) for path in (folder, file))
        # A name that is no UTF-8 is told apart well enough by its other letters.
        return paths.encode("utf-8", "replace").decode()
    except (OSError, RuntimeError, ValueError):
        return dockerfile.name


def _repository(folder: Path) -> Path | None:
    return next((one for one in (folder, *folder.parents) if (one / ".git").exists()), None)


def _read(git: Path) -> tuple[str, str]:
    if git.is_file():
        git = (git.parent / _text(git).partition("gitdir:")[2].strip()).resolve()
    head = _text(git / "HEAD")
    if not head.startswith("ref:"):
        return "", head
    name = head.removeprefix("ref:").strip()
    if not name.startswith("refs/") or ".." in name:
        return "", ""
    branch = name.removeprefix("refs/heads/")
    common = git
    if (git / "commondir").is_file():
        common = (git / _text(git / "commondir")).resolve()
    for base in (git, common):
        if (base / name).is_file():
            return branch, _text(base / name)
    packed = common / "packed-refs"
    if packed.is_file():
        for line in _text(packed).splitlines():
            revision, _, ref = line.partition(" ")
            if ref == name:
                return branch, revision
    return branch, ""


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_BYTES).decode().strip()

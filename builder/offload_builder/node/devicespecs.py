"""Copies of CDI specifications that BuildKit can read, in directories of the node's own.

One specification that it cannot read keeps a BuildKit from starting (cmd/buildkitd/main.go,
getCDIManager), and two that describe the same device do so as well. So the BuildKits of projects
look at copies of those that have been tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

log = structlog.get_logger(__name__)

MAX_FILES = 200
MAX_BYTES = 4 << 20
"""Of one specification."""
_SUFFIXES = (".json", ".yaml")
"""What CDI takes for a specification."""

Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Path, inode, size and time of change of each file."""


@dataclass(frozen=True, slots=True)
class Specification:
    """A file as it was read.

    Attributes:
        path: where it was.
        place: number of its directory; a device of a later one takes the place of an earlier one.
        data: its content.
    """

    path: Path
    place: int
    data: bytes

    def copy_in(self, root: Path) -> Path:
        """Return where its copy is below a directory of copies."""
        return copied_folder(root, self.place) / self.path.name


def copied_folder(root: Path, place: int) -> Path:
    """Return where copies of the files of one directory are."""
    return root / str(place)


def fingerprint(folders: Iterable[Path]) -> Fingerprint:
    """Return what changes when a specification does; empty where there is none. Blocks."""
    found = []
    for path in _files(folders):
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def read_specifications(folders: Sequence[Path]) -> list[Specification]:
    """Return the specifications that can be read, at most `MAX_FILES`. Blocks."""
    found: list[Specification] = []
    for place, folder in enumerate(folders):
        for path in _files((folder,)):
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_BYTES + 1)
            except OSError as error:
                log.warning("devices.specification.unreadable", path=str(path), cause=str(error))
                continue
            if len(data) > MAX_BYTES or len(found) >= MAX_FILES:
                log.warning("devices.specification.too_much", path=str(path))
                continue
            found.append(Specification(path, place, data))
    return found


def write_copies(root: Path, places: int, wanted: Iterable[Specification]) -> None:
    """Have copies of these specifications below a directory, and no others. Blocks.

    Args:
        root: the directory; it is made.
        places: how many directories there are.
        wanted: the specifications.

    Raises:
        OSError: they cannot be written.
    """
    for place in range(places):
        copied_folder(root, place).mkdir(parents=True, exist_ok=True, mode=0o700)
    copies = {item.copy_in(root): item.data for item in wanted}
    for folder in root.iterdir():
        for path in folder.iterdir():
            if path not in copies:
                path.unlink()
    for path, data in copies.items():
        if not path.exists() or path.read_bytes() != data:
            replace_small_file(path, data)


def _files(folders: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for folder in folders:
        try:
            found += sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
        except OSError:
            # There is none, which is usual.
            continue
    return found

"""Which cache mount a directory belongs to, from what the daemon says of its records.

BuildKit describes the record of a cache mount as `cached mount DEST from exec ARGS with id "ID"`,
with the destination and the command of the step that made it; the id is left out where it is the
destination (solver/llbsolver/mounts). A step mounts directories, not records; the two are brought
together by the time of their creation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from offload_builder.buildkit.client import DiskRecord
    from offload_builder.node.mounts.bundle import CacheDirectory

CACHE_MOUNT = "exec.cachemount"
_PREFIX = "cached mount "
_FROM = " from exec "
_ID = ' with id "'
_NEAR_SECONDS = 5.0
"""Between a record and its directory; a loaded machine takes its time."""


@dataclass(frozen=True, slots=True)
class MountName:
    """A cache mount of a project, the same on all nodes.

    Attributes:
        id: BuildKit's: the namespace, a slash, and the id or target of the Dockerfile.
        base: see `CacheDirectory.base`.
        platform: of the nodes that may share it.
    """

    id: str
    base: str
    platform: str

    @property
    def key(self) -> str:
        """64 hex digits for the name of its document."""
        text = json.dumps([self.id, self.base, self.platform], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def mount_id(record: DiskRecord) -> str | None:
    """Return the id of a cache mount's record; None for every other record."""
    text = record.description
    if record.kind != CACHE_MOUNT or not text.startswith(_PREFIX):
        return None
    _, found, quoted = text.rpartition(_ID)
    if not found or not quoted.endswith('"'):
        return text.removeprefix(_PREFIX).partition(_FROM)[0]
    # Go quotes nearly as JSON does; where it does not, the quoted form is a name as well.
    try:
        return str(json.loads('"' + quoted))
    except ValueError:
        return quoted


def find_record(
    directory: CacheDirectory,
    arguments: Sequence[str],
    records: Collection[DiskRecord],
    taken: Collection[str],
) -> DiskRecord | None:
    """Return the record that a directory of a running step belongs to; None when in doubt.

    Args:
        directory: the directory.
        arguments: the step's command line.
        records: all that the daemon has.
        taken: ids of records whose directories are known.
    """
    left = [
        record
        for record in records
        if mount_id(record) is not None and record.in_use and record.id not in taken
    ]
    if directory.created_at is not None:
        moment = directory.created_at
        left = [record for record in left if abs(record.created_at - moment) <= _NEAR_SECONDS]
    place = f"{_PREFIX}{directory.destination}{_FROM}"
    command = place + " ".join(arguments)

    def made_here(record: DiskRecord) -> bool:
        rest = record.description.removeprefix(command)
        return record.description.startswith(command) and (not rest or rest.startswith(_ID))

    for fits in (made_here, lambda record: record.description.startswith(place)):
        if narrowed := [record for record in left if fits(record)]:
            left = narrowed
            break
    else:
        # Another step made it, at another place; then only the time speaks for it.
        left = left if directory.created_at is not None else []
    if len({mount_id(record) for record in left}) != 1:
        return None
    return min(left, key=lambda record: _distance(directory, record))


def _distance(directory: CacheDirectory, record: DiskRecord) -> float:
    return abs(record.created_at - (directory.created_at or record.created_at))

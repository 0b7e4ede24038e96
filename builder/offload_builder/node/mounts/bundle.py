"""What a container's bundle says of its cache mounts: where they appear, and where they lie.

Without a base, a cache mount is a bind mount of an active snapshot's directory. With uid, gid or
mode it is the directory `/cache` of an overlay over a snapshot that has only that directory, bound
a second time (BuildKit: solver/llbsolver/mounts, frontend/dockerfile2llb setCacheUIDGID,
executor/oci submounts). Mounts with `from=` have files below them that are not theirs; they are
left alone, as is everything that cannot be told from something else.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from offload_builder.mountinfo import Mount, read_mounts
from offload_builder.node.mounts.packing import RESTORE_PREFIX

_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """A directory that may be a cache mount of a step.

    Attributes:
        destination: where the step sees it.
        snapshot: its snapshot's directory; tells it from all others of its daemon.
        visible: path with which files in it are created; valid while the step runs.
        stored: path where its files lie as long as the snapshot exists.
        base: owner and mode of a mount that has them ("uid:gid:mode"), else empty; BuildKit keeps
            a directory of its own for each.
        created_at: when the snapshot was made, seconds since 1970; None when that is not known.
    """

    destination: str
    snapshot: Path
    visible: Path
    stored: Path
    base: str
    created_at: float | None

    def is_empty(self) -> bool:
        """Whether no step has left anything in it."""
        try:
            with os.scandir(self.visible) as entries:
                return all(entry.name.startswith(RESTORE_PREFIX) for entry in entries)
        except OSError:
            return False

    def has_leftovers(self) -> bool:
        """Whether a mount that is empty holds what a restore that was given up has left."""
        try:
            with os.scandir(self.visible) as entries:
                return next(entries, None) is not None
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Bundle:
    """A step: its command line, and what may be its cache mounts."""

    arguments: tuple[str, ...]
    directories: tuple[CacheDirectory, ...]


def read_bundle(bundle: Path, root: Path, daemon_pid: int) -> Bundle:
    """Read a bundle of the daemon that keeps its data below `root`.

    Raises:
        OSError: it is gone.
        ValueError: it is no bundle.
    """
    with (bundle / "config.json").open("rb") as file:
        config = json.loads(file.read(_MAX_CONFIG_BYTES))
    arguments = tuple(map(str, config["process"]["args"]))
    points: dict[str, Mount] | None = None
    found: list[CacheDirectory] = []
    for mount in config.get("mounts") or ():
        source, options = str(mount.get("source", "")), mount.get("options") or ()
        if mount.get("type") not in ("bind", "none", "") or "ro" in options:
            continue
        destination = str(mount["destination"])
        if (snapshot := _snapshot_of(Path(source), root)) is not None:
            found.append(_plain(destination, snapshot, Path(source)))
        elif source.startswith("/") and "buildkit-mount" in source:
            if points is None:
                points = {mount.point: mount for mount in read_mounts(daemon_pid)}
            if (point := points.get(source)) is not None:
                # The daemon may have a mount namespace of its own.
                seen = Path(f"/proc/{daemon_pid}/root{source}")
                if (owned := _owned(destination, point, seen, root)) is not None:
                    found.append(owned)
    return Bundle(arguments, tuple(found))


def _snapshot_of(path: Path, root: Path) -> Path | None:
    """Return the snapshot directory that a path is the content of."""
    folder = path.parent if path.name == "fs" else path
    snapshots = folder.parent
    inside = (
        folder.name.isdigit()
        and snapshots.name == "snapshots"
        and snapshots.parent.parent.name.startswith("runc-")
        and snapshots.parent.parent.parent in (root, root.resolve())
    )
    return folder if inside else None


def _plain(destination: str, snapshot: Path, source: Path) -> CacheDirectory:
    # The directory around `fs` never changes again; a native snapshot is the content itself.
    created = snapshot.stat().st_mtime if source != snapshot else None
    return CacheDirectory(destination, snapshot, source, source, "", created)


def _owned(destination: str, point: Mount, seen: Path, root: Path) -> CacheDirectory | None:
    upper, lower = point.options.get("upperdir", ""), point.options.get("lowerdir", "")
    if point.kind != "overlay" or point.root != "/cache" or not upper or ":" in lower:
        return None
    snapshot = _snapshot_of(Path(upper), root)
    below = Path(lower) / "cache"
    try:
        if snapshot is None or list(below.iterdir()):
            return None
        owner = below.stat()
        created = snapshot.stat().st_mtime
    except OSError:
        return None
    base = f"{owner.st_uid}:{owner.st_gid}:{stat.S_IMODE(owner.st_mode):o}"
    stored = Path(upper) / "cache"
    return CacheDirectory(destination, snapshot, seen, stored, base, created)

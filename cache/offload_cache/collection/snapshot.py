"""What one listing of a project shows, sorted by kind; pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_cache.collection.listing import list_all
from offload_cache.keys import check_contribution_id, check_project_id, scope_of
from offload_core.digest import is_digest
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from offload_cache.objectstore import ObjectInfo, ObjectStore

REMOVED_IMAGES = "%images"


@dataclass(slots=True)
class ProjectSnapshot:
    """The objects of one project.

    Attributes:
        project_id: whose they are.
        blobs: by digest.
        contributions: by scope and name.
        removed: contributions that count no more, by scope and name.
        images: by digest of the manifest.
        removed_images: that count no more, by digest of the manifest.
        mounts: stored cache mounts, by scope and name.
        leases: all of them.
        condemned: lists of blobs that a collection deletes, or was deleting when it died.
        packed: by scope.
        used: by scope and key.
        dated: documents that name no blobs and go by their age alone.
        former: of a layout that is no longer read.
        context: "index", "packs" and "used" of the packs of build contexts, by name.
        size_bytes: of all objects.
        count: of all objects.
    """

    project_id: str
    blobs: dict[str, ObjectInfo] = field(default_factory=dict)
    contributions: dict[tuple[str, str], ObjectInfo] = field(default_factory=dict)
    removed: dict[tuple[str, str], ObjectInfo] = field(default_factory=dict)
    images: dict[str, ObjectInfo] = field(default_factory=dict)
    removed_images: dict[str, ObjectInfo] = field(default_factory=dict)
    mounts: dict[tuple[str, str], ObjectInfo] = field(default_factory=dict)
    leases: list[ObjectInfo] = field(default_factory=list)
    condemned: list[ObjectInfo] = field(default_factory=list)
    packed: dict[str, ObjectInfo] = field(default_factory=dict)
    used: dict[tuple[str, str], ObjectInfo] = field(default_factory=dict)
    dated: list[ObjectInfo] = field(default_factory=list)
    former: list[ObjectInfo] = field(default_factory=list)
    context: dict[str, dict[str, ObjectInfo]] = field(
        default_factory=lambda: {"index": {}, "packs": {}, "used": {}}
    )
    size_bytes: int = 0
    count: int = 0

    @property
    def _plain(self) -> dict[str, list[ObjectInfo]]:
        return {
            "leases": self.leases,
            "condemned": self.condemned,
            "scopes": self.former,
            "bases": self.dated,
            "traces": self.dated,
        }

    def add(self, found: Iterable[ObjectInfo]) -> None:
        """Sort objects in; keys that nothing here makes are left alone."""
        prefix = f"projects/{self.project_id}/"
        for info in found:
            kind, _, rest = info.key.removeprefix(prefix).partition("/")
            self.size_bytes += info.size_bytes
            self.count += 1
            try:
                self._add(kind, rest, info)
            except UsageError:
                continue

    def _add(self, kind: str, rest: str, info: ObjectInfo) -> None:
        first, _, second = rest.partition("/")
        if kind == "blobs":
            digest = f"sha256:{second}"
            if first == "sha256" and is_digest(digest):
                self.blobs[digest] = info
        elif kind == "contributions":
            self.contributions[scope_of(first), check_contribution_id(second)] = info
        elif kind == "removed":
            if first == REMOVED_IMAGES:
                self.removed_images[_image(second)] = info
            else:
                self.removed[scope_of(first), check_contribution_id(second)] = info
        elif kind == "images":
            self.images[_image(rest)] = info
        elif kind == "mounts":
            self.mounts[scope_of(first), _name(second)] = info
        elif kind == "packed":
            self.packed[scope_of(rest)] = info
        elif kind == "used":
            self.used[scope_of(first), scope_of(second)] = info
        elif kind in self._plain:
            self._plain[kind].append(info)
        elif kind == "context" and first in self.context:
            self.context[first][second] = info


def _name(name: str) -> str:
    """Return a name of 64 hexadecimal digits."""
    return _image(name).removeprefix("sha256:")


def _image(name: str) -> str:
    digest = f"sha256:{name}"
    if not is_digest(digest):
        raise UsageError("not the name of an image")
    return digest


async def read_snapshot(objects: ObjectStore, project_id: str) -> ProjectSnapshot:
    """List a whole project.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    snapshot = ProjectSnapshot(check_project_id(project_id))
    snapshot.add(await list_all(objects, f"projects/{project_id}/"))
    return snapshot


async def read_roots_snapshot(
    objects: ObjectStore,
    project_id: str,
    read_leases: Callable[[Sequence[ObjectInfo]], Awaitable[None]],
) -> ProjectSnapshot:
    """List all that keeps blobs, in the order that misses nothing which is on the move.

    A lease ends after its document is written: so leases are listed *and read* before documents
    are listed. A document is removed after its copy in `removed/` is written: that comes last.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    snapshot = ProjectSnapshot(check_project_id(project_id))
    snapshot.add(await list_all(objects, f"projects/{project_id}/leases/"))
    await read_leases(snapshot.leases)
    for kind in ("contributions", "images", "mounts", "removed"):
        snapshot.add(await list_all(objects, f"projects/{project_id}/{kind}/"))
    return snapshot

"""What a project takes in the shared store, for people."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_cache.collection.plan import used_at
from offload_cache.collection.roots import RootReader
from offload_cache.collection.snapshot import read_snapshot

if TYPE_CHECKING:
    from offload_cache.collection.roots import ProjectRoots, Root
    from offload_cache.collection.snapshot import ProjectSnapshot
    from offload_cache.contributions import Writer
    from offload_cache.objectstore import ObjectStore


@dataclass(frozen=True, slots=True)
class ScopeMeasure:
    """One scope.

    Attributes:
        scope: its name.
        contributions: how many.
        layer_bytes: of all layers that they name.
        own_bytes: of those that neither another scope nor an image names.
        writer: of the newest contribution.
        written_at: when that was written.
        used_at: when one was last of use to a build, a day exact.
    """

    scope: str
    contributions: int
    layer_bytes: int
    own_bytes: int
    writer: Writer
    written_at: datetime
    used_at: datetime


@dataclass(slots=True)
class ProjectMeasure:
    """One project.

    Attributes:
        size_bytes: of all objects.
        objects: how many.
        live_bytes: of blobs that contributions, images and leases name.
        garbage_bytes: of all other blobs; they go when their grace is over.
        image_bytes: of blobs that images name.
        mount_bytes: of blobs of cache mounts.
        context_bytes: of packs of build contexts.
        images: how many.
        scopes: the largest first.
    """

    size_bytes: int = 0
    objects: int = 0
    live_bytes: int = 0
    garbage_bytes: int = 0
    image_bytes: int = 0
    mount_bytes: int = 0
    context_bytes: int = 0
    images: int = 0
    scopes: list[ScopeMeasure] = field(default_factory=list)


async def measure(objects: ObjectStore, project_id: str) -> ProjectMeasure:
    """Measure a project: one listing, and one read for each document.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    snapshot = await read_snapshot(objects, project_id)
    roots = await RootReader(objects).read(snapshot)
    return measure_snapshot(snapshot, roots, now=datetime.now(UTC))


def measure_snapshot(
    snapshot: ProjectSnapshot, roots: ProjectRoots, *, now: datetime
) -> ProjectMeasure:
    """Measure what was read; `now` is in UTC."""
    found = ProjectMeasure(size_bytes=snapshot.size_bytes, objects=snapshot.count)
    names: dict[str, set[str]] = defaultdict(set)
    scopes: dict[str, list[Root]] = defaultdict(list)
    for root in roots.live:
        for digest, _ in root.blobs:
            names[digest].add(root.scope)
        if root.is_image:
            found.images += 1
        elif root.is_mount:
            found.mount_bytes += sum(size for _, size in root.blobs)
        else:
            scopes[root.scope].append(root)
    leased = roots.leased_digests(now)
    for digest, info in snapshot.blobs.items():
        if digest in names or digest in leased:
            found.live_bytes += info.size_bytes
        else:
            found.garbage_bytes += info.size_bytes
        if "" in names.get(digest, ()):
            found.image_bytes += info.size_bytes
    found.context_bytes = sum(
        info.size_bytes for kind in ("index", "packs") for info in snapshot.context[kind].values()
    )
    used = {name: info.modified_at for name, info in snapshot.used.items()}
    for scope, members in scopes.items():
        sizes = {digest: size for root in members for digest, size in root.blobs}
        newest = min(members, key=lambda root: root.name)
        found.scopes.append(
            ScopeMeasure(
                scope=scope,
                contributions=len(members),
                layer_bytes=sum(sizes.values()),
                own_bytes=sum(size for digest, size in sizes.items() if names[digest] == {scope}),
                writer=newest.writer,
                written_at=newest.written_at,
                used_at=max(used_at(root, used) for root in members),
            )
        )
    found.scopes.sort(key=lambda scope: (-scope.layer_bytes, scope.scope))
    return found

"""Removal of documents: they count no more, but a copy protects their blobs for the grace."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from offload_cache.collection.plan import longest_unused, used_at
from offload_cache.collection.roots import RootReader
from offload_cache.collection.snapshot import read_snapshot
from offload_cache.contributions import MAX_CONTRIBUTION_BYTES
from offload_cache.images import MAX_IMAGE_BYTES
from offload_cache.keys import contribution_key, image_key, removed_image_key
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from offload_cache.collection.roots import Root
    from offload_cache.objectstore import ObjectStore


_MOVE_SECONDS = 300.0


def anything(_root: Root) -> bool:
    """Allow the removal of any contribution."""
    return True


@dataclass(frozen=True, slots=True)
class RemovalFilter:
    """Which contributions go.

    Attributes:
        scopes: only of these scopes; None for all.
        unused_seconds: only those that were of no use for so long; None for all.
        keep_bytes: only so many that the rest of them fits; None or 0 for all. The longest unused
            first.
        allowed: asked for each, for what the caller may remove.
    """

    scopes: frozenset[str] | None = None
    unused_seconds: float | None = None
    keep_bytes: int | None = None
    allowed: Callable[[Root], bool] = anything


@dataclass(slots=True)
class Removal:
    """What went, or would go.

    Attributes:
        removed: contributions.
        freed_bytes: of blobs that nothing else names; they go when the grace is over.
    """

    removed: list[Root] = field(default_factory=list)
    freed_bytes: int = 0


def plan_removal(
    roots: Sequence[Root],
    used: Mapping[tuple[str, str], datetime],
    select: RemovalFilter,
    *,
    now: datetime,
) -> Removal:
    """Decide what a filter means for all roots of a project."""
    chosen = [
        root
        for root in roots
        if root.is_contribution
        and (select.scopes is None or root.scope in select.scopes)
        and select.allowed(root)
    ]
    if select.unused_seconds is not None:
        oldest = now - timedelta(seconds=select.unused_seconds)
        chosen = [root for root in chosen if used_at(root, used) < oldest]
    chosen.sort(key=lambda root: (used_at(root, used), root.name))
    if select.keep_bytes:
        count, _ = longest_unused([("", root) for root in chosen], select.keep_bytes, freed_share=0)
        chosen = chosen[:count]
    going = {(root.scope, root.name) for root in chosen}
    names = Counter(
        digest for root in roots if (root.scope, root.name) not in going for digest, _ in root.blobs
    )
    freed = {digest: size for root in chosen for digest, size in root.blobs if not names[digest]}
    return Removal(chosen, sum(freed.values()))


async def remove_contributions(
    objects: ObjectStore, project_id: str, select: RemovalFilter, *, dry_run: bool = False
) -> Removal:
    """Remove contributions of a project, or only say which would go.

    Raises:
        CacheUnavailableError: the store does not answer; what went before stays removed.
    """
    snapshot = await read_snapshot(objects, project_id)
    roots = await RootReader(objects).read(snapshot)
    used = {name: info.modified_at for name, info in snapshot.used.items()}
    removal = plan_removal(roots.live, used, select, now=datetime.now(UTC))
    if not dry_run:
        for root in removal.removed:
            await retire_contribution(objects, project_id, root.scope, root.name)
    return removal


async def retire_contribution(
    objects: ObjectStore,
    project_id: str,
    scope: str,
    contribution_id: str,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Remove one contribution; fine when it is gone already.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    await _move(
        objects,
        contribution_key(project_id, scope, contribution_id),
        contribution_key(project_id, scope, contribution_id, kind="removed"),
        MAX_CONTRIBUTION_BYTES,
        clock,
    )


async def retire_image(
    objects: ObjectStore,
    project_id: str,
    digest: str,
    may_delete: Callable[[], Awaitable[bool]],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Remove an image; its manifest's digest must be condemned, or a new push may be lost.

    Args:
        objects: the shared store.
        project_id: the project.
        digest: of the manifest.
        may_delete: whether the list of what is condemned still counts; asked before the deletion.
        clock: monotonic, in seconds.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    await _move(
        objects,
        image_key(project_id, digest),
        removed_image_key(project_id, digest),
        MAX_IMAGE_BYTES,
        clock,
        may_delete,
    )


async def _always() -> bool:
    return True


async def _move(
    objects: ObjectStore,
    key: str,
    to: str,
    max_bytes: int,
    clock: Callable[[], float],
    may_delete: Callable[[], Awaitable[bool]] = _always,
) -> None:
    try:
        data = await objects.read_bytes(key, max_bytes=max_bytes)
    except NotFoundError:
        return
    while True:
        started = clock()
        await objects.write_bytes(to, data)
        if clock() - started <= _MOVE_SECONDS:
            # The grace counts from the copy: it must not have begun long before the removal.
            break
    if await may_delete():
        await objects.delete(key)

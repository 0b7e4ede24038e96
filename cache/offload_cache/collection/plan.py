"""What a collection decides, as functions of what it has seen: nothing here touches the store."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from offload_cache.collection.timing import LEASE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from offload_cache.collection.roots import ProjectRoots, Root
    from offload_cache.collection.snapshot import ProjectSnapshot

NEWEST_KEPT = 32
"""Contributions of one scope with one key; older ones have nothing that builds still ask for."""
DATED_KEPT = timedelta(days=30)
"""Traces of builds, and what names of base images meant, are kept for so long."""
_FREED_SHARE = 0.1
"""Beyond a bound so much more is freed that it does not come to this with every build."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one project may keep in the shared store.

    Attributes:
        keep_bytes: bound of all layers and images together; 0 for none.
        idle_seconds: how long a contribution or image may be of no use.
        context_keep_bytes: bound of all packs of build contexts together.
        context_idle_seconds: how long such a pack may be of no use.
    """

    keep_bytes: int
    idle_seconds: float
    context_keep_bytes: int
    context_idle_seconds: float


@dataclass(slots=True)
class Retention:
    """Which roots go.

    Attributes:
        removed: with the reason: "unused", "superseded" or "bytes".
        kept: all others.
        live_bytes: of the blobs of those that stay.
    """

    removed: list[tuple[Root, str]] = field(default_factory=list)
    kept: list[Root] = field(default_factory=list)
    live_bytes: int = 0


def used_at(root: Root, used: Mapping[tuple[str, str], datetime]) -> datetime:
    """Return when a root was last of use: written, or the mark of its scope and key renewed."""
    mark = used.get((root.scope, root.key)) if root.is_contribution else None
    return root.written_at if mark is None else max(mark, root.written_at)


def plan_retention(
    roots: Sequence[Root],
    used: Mapping[tuple[str, str], datetime],
    limits: Limits,
    *,
    now: datetime,
    newest: int = NEWEST_KEPT,
) -> Retention:
    """Decide which contributions, images and cache mounts a project gives up.

    Args:
        roots: all that count.
        used: when a key of a scope was last of use, by scope and key.
        limits: of the project.
        now: by the store's clock.
        newest: how many contributions of one scope and key stay.
    """
    retention = Retention()
    oldest = now - timedelta(seconds=limits.idle_seconds)
    groups: defaultdict[tuple[str, str], list[Root]] = defaultdict(list)
    candidates = []
    for root in roots:
        if used_at(root, used) < oldest:
            retention.removed.append((root, "unused"))
        elif not root.is_contribution:
            candidates.append(root)
        else:
            groups[root.scope, root.key].append(root)
    for group in groups.values():
        group.sort(key=lambda root: root.name)  # newest first, see keys.new_contribution_id
        candidates += group[:newest]
        retention.removed += [(root, "superseded") for root in group[newest:]]
    order = sorted(candidates, key=lambda root: (used_at(root, used), root.name))
    gone, retention.live_bytes = longest_unused([("", root) for root in order], limits.keep_bytes)
    retention.removed += [(root, "bytes") for root in order[:gone]]
    retention.kept = order[gone:]
    return retention


def longest_unused(
    roots: Sequence[tuple[str, Root]], keep_bytes: int, *, freed_share: float = _FREED_SHARE
) -> tuple[int, int]:
    """Return how many of `roots` from the first go until the rest fits, and the bytes of the rest.

    Blobs of one project are counted once, however many roots name them.

    Args:
        roots: with their projects, the longest unused first.
        keep_bytes: bound; 0 for none.
        freed_share: of the bound, freed as well when there is more than the bound.
    """
    names: Counter[tuple[str, str]] = Counter()
    sizes: dict[tuple[str, str], int] = {}
    for project, root in roots:
        for digest, size_bytes in root.blobs:
            names[project, digest] += 1
            sizes[project, digest] = size_bytes
    total = sum(sizes.values())
    target = total
    if keep_bytes and total > keep_bytes:
        target = int(keep_bytes * (1 - freed_share))
    gone = 0
    for project, root in roots:
        if total <= target:
            break
        for digest, _ in root.blobs:
            names[project, digest] -= 1
            if not names[project, digest]:
                total -= sizes[project, digest]
        gone += 1
    return gone, total


@dataclass(slots=True)
class SweepPlan:
    """What is deleted.

    Attributes:
        blobs: unmarked and old enough, by digest with the bytes of each.
        young_bytes: of unmarked blobs that are not old enough.
        objects: other keys that may go at once.
        removed: keys of copies of removed documents whose grace is over, by scope and name.
    """

    blobs: dict[str, int] = field(default_factory=dict)
    young_bytes: int = 0
    objects: list[str] = field(default_factory=list)
    removed: dict[tuple[str, str], str] = field(default_factory=dict)


def plan_sweep(
    snapshot: ProjectSnapshot, roots: ProjectRoots, *, now: datetime, grace: timedelta
) -> SweepPlan:
    """Decide what goes of a project, from one listing and the documents in it.

    Args:
        snapshot: the listing.
        roots: its documents.
        now: by the store's clock.
        grace: how old a blob must be, and how long a removed document still counts.
    """
    plan = SweepPlan()
    marked = roots.marks(now, grace)
    for digest, info in snapshot.blobs.items():
        if digest in marked:
            continue
        if info.modified_at + grace < now:
            plan.blobs[digest] = info.size_bytes
        else:
            plan.young_bytes += info.size_bytes
    leased = roots.leased_contributions(now)
    for name, info in snapshot.removed.items():
        if info.modified_at + grace < now and name not in leased:
            plan.removed[name] = info.key
    for digest, info in snapshot.removed_images.items():
        if info.modified_at + grace < now:
            plan.removed["", digest] = info.key
    plan.objects = _leavings(snapshot, roots, now=now, grace=grace)
    plan.objects += [info.key for info in snapshot.dated if info.modified_at + DATED_KEPT < now]
    return plan


def _leavings(
    snapshot: ProjectSnapshot, roots: ProjectRoots, *, now: datetime, grace: timedelta
) -> list[str]:
    """Return the keys of what crashes and finished work have left."""
    keys = [lease.key for lease in roots.leases if lease.until <= now]
    keys += [info.key for info in snapshot.former]
    # A list of condemned blobs counts no longer than a lease, whatever it says.
    keys += [
        info.key
        for info in snapshot.condemned
        if info.modified_at + timedelta(seconds=LEASE_SECONDS) <= now
    ]
    scopes = {scope for scope, _ in snapshot.contributions}
    entries = {(root.scope, root.key) for root in roots.live if root.is_contribution}
    old = [info for scope, info in snapshot.packed.items() if scope not in scopes]
    old += [info for name, info in snapshot.used.items() if name not in entries]
    old += roots.damaged
    return keys + [info.key for info in old if info.modified_at + grace < now]

"""Bounds what a project's packs take in the shared store; collections carry it out.

A pack counts as used when it was stored and on each day on which a node reads from it; the node
then writes an empty object next to it, the mark of use. A pack that was not used for long enough
is deleted, and beyond the bound of bytes those that were not used for longest. Readers may still
know a deleted pack: for them its blobs are a miss, which is a question to the client and no fault.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from offload_cache.keys import pack_key
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_cache.objectstore import ObjectInfo, ObjectStore

_ORPHAN_GRACE = timedelta(days=1)
"""A pack whose index is not there yet may be under way; one whose index is gone may be read."""
_FREED_SHARE = 0.1
"""Beyond the bound so much more is freed that it does not come to this with every pack."""


@dataclass(slots=True)
class SweepPlan:
    """What to delete, by name of the pack.

    Attributes:
        packs: index first, then the pack.
        marks: marks of use whose pack is gone.
        stored_bytes: of the packs that stay.
    """

    packs: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    stored_bytes: int = 0


def plan_sweep(
    indexes: Mapping[str, ObjectInfo],
    packs: Mapping[str, ObjectInfo],
    marks: Mapping[str, ObjectInfo],
    *,
    now: datetime,
    keep_bytes: int,
    keep_seconds: float,
) -> SweepPlan:
    """Decide what to delete.

    Args:
        indexes: by name; listed before the packs, so that each index had its pack.
        packs: by name.
        marks: of use, by name.
        now: in UTC.
        keep_bytes: bound of all packs together.
        keep_seconds: how long a pack may go unused.
    """
    plan = SweepPlan(
        packs=sorted(indexes.keys() - packs.keys()), marks=sorted(marks.keys() - packs.keys())
    )
    used_at = {
        name: max(found[name].modified_at for found in (indexes, packs, marks) if name in found)
        for name in packs
    }
    plan.stored_bytes = sum(pack.size_bytes for pack in packs.values())
    target = keep_bytes
    if plan.stored_bytes > keep_bytes:
        target = int(keep_bytes * (1 - _FREED_SHARE))
    expired = now - timedelta(seconds=keep_seconds)
    for name in sorted(packs, key=lambda name: (used_at[name], name)):
        orphan = name not in indexes and used_at[name] < now - _ORPHAN_GRACE
        if orphan or used_at[name] < expired or plan.stored_bytes > target:
            plan.packs.append(name)
            plan.stored_bytes -= packs[name].size_bytes
    return plan


def valid_packs(
    project_id: str, kind: str, found: Mapping[str, ObjectInfo]
) -> dict[str, ObjectInfo]:
    """Return the objects, by name, that are packs, indexes or marks of use; others are not ours."""
    named: dict[str, ObjectInfo] = {}
    for name, info in found.items():
        with contextlib.suppress(UsageError):
            pack_key(project_id, kind, name)
            named[name] = info
    return named


async def delete_packs(
    objects: ObjectStore,
    project_id: str,
    plan: SweepPlan,
    indexes: Mapping[str, ObjectInfo],
    packs: Mapping[str, ObjectInfo],
    marks: Mapping[str, ObjectInfo],
) -> None:
    """Carry a plan out that was made of these objects.

    Raises:
        CacheUnavailableError: the shared store does not answer.
    """
    for name in plan.packs:
        # Index first: nobody learns of a pack that is going.
        for kind, found in (("index", indexes), ("packs", packs), ("used", marks)):
            if name in found:
                await objects.delete(pack_key(project_id, kind, name))
    for name in plan.marks:
        await objects.delete(pack_key(project_id, "used", name))

"""Which contributions a prune removes, and what that frees. Pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from datetime import datetime, timedelta

    from offload_cache.admin.summaries import EntrySummary


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """What goes.

    Attributes:
        scope: "PROJECT/NAME"; empty for all scopes.
        unused_for: only entries that were of no use to a build for so long.
        keep_bytes: only so many that the layers of the rest have at most so many bytes, the
            longest unused first; 0 for no such bound.
    """

    scope: str = ""
    unused_for: timedelta | None = None
    keep_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ScopeSize:
    """Sizes of one scope.

    Attributes:
        scope: "PROJECT/NAME".
        entries: its contributions, the newest first.
        layer_bytes: of all layers that they name.
        own_bytes: of those that no other scope names.
        used_at: when a build last had use of one.
    """

    scope: str
    entries: tuple[EntrySummary, ...]
    layer_bytes: int
    own_bytes: int
    used_at: datetime


def select(
    entries: Iterable[EntrySummary], wanted: EntryFilter, now: datetime
) -> list[EntrySummary]:
    """Return the entries that go, the longest unused first."""
    reach = [entry for entry in entries if wanted.scope in ("", entry.scope)]
    reach.sort(key=lambda entry: (entry.used_at, entry.scope, entry.entry_id))
    chosen = reach
    if wanted.unused_for is not None:
        # Ages are compared: a date may not be early enough to take the time from it.
        chosen = [entry for entry in reach if now - entry.used_at >= wanted.unused_for]
    if not wanted.keep_bytes:
        return chosen
    names: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for entry in reach:
        names.update(entry.layers.keys())
        sizes.update(entry.layers)
    left = sum(sizes.values())
    gone = []
    for entry in chosen:
        if left <= wanted.keep_bytes:
            break
        gone.append(entry)
        names.subtract(entry.layers.keys())
        left -= sum(size for digest, size in entry.layers.items() if not names[digest])
    return gone


def freed_layers(
    entries: Iterable[EntrySummary],
    gone: Sequence[EntrySummary],
    needed: Collection[str] = frozenset(),
) -> dict[str, int]:
    """Return bytes by digest of the layers that only the entries in `gone` name.

    Args:
        entries: all there are.
        gone: those that go.
        needed: digests that something else names.
    """
    removed = {(entry.scope, entry.entry_id) for entry in gone}
    kept = set(needed)
    for entry in entries:
        if (entry.scope, entry.entry_id) not in removed:
            kept.update(entry.layers)
    freed: dict[str, int] = {}
    for entry in gone:
        freed.update(entry.layers)
    return {digest: size for digest, size in freed.items() if digest not in kept}


def measure_scopes(entries: Iterable[EntrySummary]) -> list[ScopeSize]:
    """Return the sizes of scopes, the largest first."""
    by_scope: dict[str, list[EntrySummary]] = defaultdict(list)
    for entry in entries:
        by_scope[entry.scope].append(entry)
    layers = {
        scope: {digest: size for entry in found for digest, size in entry.layers.items()}
        for scope, found in by_scope.items()
    }
    named = Counter(digest for found in layers.values() for digest in found)
    sizes = [
        ScopeSize(
            scope=scope,
            entries=tuple(sorted(found, key=lambda entry: entry.written_at, reverse=True)),
            layer_bytes=sum(layers[scope].values()),
            own_bytes=sum(size for digest, size in layers[scope].items() if named[digest] == 1),
            used_at=max(entry.used_at for entry in found),
        )
        for scope, found in by_scope.items()
    ]
    return sorted(sizes, key=lambda size: (-size.layer_bytes, size.scope))

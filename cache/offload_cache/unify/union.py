"""Several builds' records as one set: one record per cache key, one result per record."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_cache.unify.closure import Closure, rename
from offload_cache.unify.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from offload_cache.contributions import CacheLayer
    from offload_cache.unify.records import Part, Result


@dataclass(frozen=True, slots=True)
class Union:
    """What several contributions have together.

    Attributes:
        records: by identifier, each with at most one result.
        chains: of the results, see `Part.chains`.
        layers: descriptors of the layers that the results need, by digest.
        missing: layers that results would need and that are not to be had.
    """

    records: Mapping[bytes, Record]
    chains: Mapping[bytes, tuple[str, bytes | None]]
    layers: Mapping[str, CacheLayer]
    missing: frozenset[str]


def unite(parts: Iterable[Part], available: Callable[[str], bool]) -> Union:
    """Unite contributions; the outcome does not depend on their order.

    Of the results of a record the oldest whose whole chain of layers is available stays: it
    replaces nothing that a node or a teammate has already, so the same layers are used for as long
    as they live. A record is kept although its result is gone: others are found through it.

    Args:
        parts: the contributions.
        available: whether a layer can be had, by digest; asked once for each.
    """
    records: dict[bytes, Record] = {}
    results: dict[bytes, set[Result]] = {}
    chains: dict[bytes, tuple[str, bytes | None]] = {}
    layers: dict[str, CacheLayer] = {}
    for part in parts:
        chains.update(part.chains)
        for name, record in part.records.items():
            records.setdefault(name, record)
            if record.results:
                results.setdefault(name, set()).update(record.results)
        for digest, layer in part.layers.items():
            known = layers.setdefault(digest, layer)
            if known is not layer and _layer_order(layer) < _layer_order(known):
                layers[digest] = layer
    whole = _Wholeness(chains, layers, available)
    classes = Closure(records).classes()
    names = rename(classes)
    united: dict[bytes, Record] = {}
    for home, name in names.items():  # parents first
        digest, inputs, members = classes[home]
        alternatives = tuple(
            frozenset((names[parent], selector) for parent, selector in some) for some in inputs
        )
        usable = [
            result
            for member in members
            for result in results.get(member, ())
            if whole.is_whole(result.chain)
        ]
        best = min(usable, key=lambda r: (r.created_at, chains[r.chain][0], r.chain), default=None)
        depth = max((united[p].depth + 1 for some in alternatives for p, _ in some), default=0)
        united[name] = Record(digest, depth, alternatives, (best,) if best is not None else ())
    return _only_needed(united, chains, layers, frozenset(whole.missing))


def _layer_order(layer: CacheLayer) -> tuple[int, str, list[tuple[str, str]]]:
    return layer.size_bytes, layer.media_type, sorted(layer.annotations.items())


def _only_needed(
    records: Mapping[bytes, Record],
    chains: Mapping[bytes, tuple[str, bytes | None]],
    layers: Mapping[str, CacheLayer],
    missing: frozenset[str],
) -> Union:
    """Drop what no result refers to."""
    needed: dict[bytes, tuple[str, bytes | None]] = {}
    for record in records.values():
        for result in record.results:
            at: bytes | None = result.chain
            while at is not None and at not in needed:
                needed[at] = chains[at]
                at = chains[at][1]
    blobs = {blob for blob, _ in needed.values()}
    return Union(records, needed, {blob: layers[blob] for blob in blobs}, missing)


class _Wholeness:
    """Whether all layers of a chain can be had; remembers what it found."""

    def __init__(
        self,
        chains: Mapping[bytes, tuple[str, bytes | None]],
        layers: Mapping[str, CacheLayer],
        available: Callable[[str], bool],
    ) -> None:
        self.missing: set[str] = set()
        self._chains = chains
        self._layers = layers
        self._available = available
        self._blobs: dict[str, bool] = {}
        self._known: dict[bytes, bool] = {}

    def is_whole(self, chain: bytes) -> bool:
        path = []
        at: bytes | None = chain
        while at is not None and at not in self._known:
            path.append(at)
            at = self._chains[at][1]
        whole = at is None or self._known[at]
        for name in reversed(path):
            whole = self._has(self._chains[name][0]) and whole
            self._known[name] = whole
        return whole

    def _has(self, blob: str) -> bool:
        known = self._blobs.get(blob)
        if known is None:
            # A layer that no manifest lists was not to be had when the contribution was made.
            listed = blob in self._layers
            known = self._blobs[blob] = listed and self._available(blob)
            if listed and not known:
                self.missing.add(blob)
        return known


def keep_newest(union: Union, max_records: int) -> Union:
    """Return the union with at most `max_records`, without the oldest leaves of its tree."""
    children: dict[bytes, int] = dict.fromkeys(union.records, 0)
    for record in union.records.values():
        for parent in {parent for some in record.inputs for parent, _ in some}:
            children[parent] += 1

    def age(name: bytes) -> tuple[str, int, bytes]:
        record = union.records[name]
        time = record.results[0].created_at if record.results else ""
        return time, -record.depth, name

    leaves = [age(name) for name, count in children.items() if count == 0]
    heapq.heapify(leaves)
    records = dict(union.records)
    while len(records) > max_records and leaves:
        name = heapq.heappop(leaves)[2]
        record = records.pop(name)
        for parent in {parent for some in record.inputs for parent, _ in some}:
            children[parent] -= 1
            if children[parent] == 0:
                heapq.heappush(leaves, age(parent))
    return _only_needed(records, union.chains, union.layers, union.missing)

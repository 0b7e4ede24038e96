"""Contributions in short: who wrote them, when they were of use, which layers they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_cache.collection.listing import StoreClock, list_all
from offload_cache.collection.plan import used_at
from offload_cache.collection.roots import RootReader
from offload_cache.collection.snapshot import read_snapshot
from offload_cache.keys import kind_prefix

if TYPE_CHECKING:
    from datetime import datetime

    from offload_cache.collection.roots import Root
    from offload_cache.contributions import Contribution, Writer
    from offload_cache.objectstore import ObjectStore


@dataclass(frozen=True, slots=True)
class EntrySummary:
    """One contribution without its records.

    Attributes:
        scope: "PROJECT/NAME".
        entry_id: its name in the scope.
        written_at: when it was written.
        used_at: when a build last had use of its key, at least `written_at`.
        writer: who wrote it.
        layers: bytes by digest.
    """

    scope: str
    entry_id: str
    written_at: datetime
    used_at: datetime
    writer: Writer
    layers: dict[str, int]

    @property
    def layer_bytes(self) -> int:
        """Bytes of all its layers."""
        return sum(self.layers.values())

    @classmethod
    def of_contribution(cls, found: Contribution, used: datetime) -> EntrySummary:
        """Return a contribution that only this node has in short."""
        at = found.created_at
        return cls(
            scope=found.scope,
            entry_id=found.contribution_id,
            written_at=at,
            used_at=max(at, used),
            writer=found.writer,
            layers=dict(found.blobs),
        )

    @classmethod
    def of_root(cls, root: Root, used: dict[tuple[str, str], datetime]) -> EntrySummary:
        """Return a contribution of the shared store in short."""
        return cls(
            scope=root.scope,
            entry_id=root.name,
            written_at=root.written_at,
            used_at=used_at(root, used),
            writer=root.writer,
            layers=dict(root.blobs),
        )


@dataclass(slots=True)
class SharedContents:
    """What the shared store has of one project.

    Attributes:
        entries: contributions that count.
        image_layers: digests of the blobs that images name.
        total_bytes: of all objects.
        objects: how many there are.
        garbage_bytes: of blobs that nothing needs any more.
    """

    entries: list[EntrySummary] = field(default_factory=list)
    image_layers: frozenset[str] = frozenset()
    total_bytes: int = 0
    objects: int = 0
    garbage_bytes: int = 0


class SharedReader:
    """Reads what the shared store has of one project; documents are read once."""

    def __init__(self, project_id: str, objects: ObjectStore) -> None:
        self._project_id = project_id
        self._objects = objects
        self._roots = RootReader(objects)

    async def entries(self) -> SharedContents:
        """Return the contributions and what images name, without sizes of the whole.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        snapshot, roots = await self._roots.read_again(self._project_id)
        snapshot.add(await list_all(self._objects, kind_prefix(self._project_id, "used")))
        return _contents(
            roots.live, {name: info.modified_at for name, info in snapshot.used.items()}
        )

    async def measure(self) -> SharedContents:
        """Return everything, from a listing of all objects of the project.

        Raises:
            CacheUnavailableError: the store does not answer.
        """
        now = (await StoreClock.read(self._objects)).now()
        snapshot = await read_snapshot(self._objects, self._project_id)
        roots = await self._roots.read(snapshot)
        contents = _contents(
            roots.live, {name: info.modified_at for name, info in snapshot.used.items()}
        )
        contents.total_bytes, contents.objects = snapshot.size_bytes, snapshot.count
        needed = {digest for root in roots.live for digest, _ in root.blobs}
        needed |= roots.leased_digests(now)
        contents.garbage_bytes = sum(
            info.size_bytes for digest, info in snapshot.blobs.items() if digest not in needed
        )
        return contents


def _contents(roots: list[Root], used: dict[tuple[str, str], datetime]) -> SharedContents:
    others = (root for root in roots if not root.is_contribution)
    return SharedContents(
        entries=[EntrySummary.of_root(root, used) for root in roots if root.is_contribution],
        image_layers=frozenset(digest for root in others for digest, _ in root.blobs),
    )

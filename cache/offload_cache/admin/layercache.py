"""The layer cache of one project as people work on it: measured, pruned, promoted.

With a shared store that store counts, and this node adds only what it has not uploaded yet. Without
one the node's own index is all there is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, TypeVar

import structlog

from offload_cache.admin.selection import freed_layers, select
from offload_cache.admin.summaries import EntrySummary, SharedContents, SharedReader
from offload_cache.collection.removal import retire_contribution
from offload_cache.collection.report import read_report
from offload_cache.contributions import MAX_CONTRIBUTION_BYTES, Contribution
from offload_cache.keys import contribution_key
from offload_core.aio import for_each
from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from offload_cache.admin.selection import EntryFilter
    from offload_cache.objectstore import ObjectStore
    from offload_cache.tiered import ProjectStore

T = TypeVar("T")
_log = structlog.get_logger(__name__)

PUBLISH_SECONDS = 20.0
"""How long a promotion waits until other nodes can read the copies; later they can all the same."""

TRUSTED_WRITERS = frozenset({"admin", "ci", "member"})
"""Roles whose contributions may be copied to another scope."""

_PARALLEL = 8
_FOREVER = float("inf")


class InThread(Protocol):
    """Does blocking work elsewhere; `NodeStore.in_thread` is one."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Return what `work` returns."""


class LocalMember(Protocol):
    """What a node's index says of one contribution."""

    @property
    def contribution_id(self) -> str:
        """Its name in the scope."""

    @property
    def key(self) -> str:
        """Tells builds of one scope apart."""


class LocalScopes(Protocol):
    """The contributions that a node knows; `offload_cache.scopes.ScopeIndex` is one."""

    async def scopes(self) -> list[str]:
        """Return the scopes that this node knows contributions of."""

    async def load(self, scopes: Iterable[str]) -> None:
        """Have the node's index of scopes in memory."""

    def members(self, scope: str) -> Sequence[LocalMember]:
        """Return what is known of a loaded scope."""

    def last_use(self, scope: str, key: str) -> float:
        """Return when a key was last of use, in seconds since the epoch; 0 when nobody said."""

    async def documents(self, scope: str, names: Sequence[str]) -> dict[str, bytes]:
        """Return documents of this node by contribution."""

    async def waiting(self, scope: str) -> set[str]:
        """Return the contributions of a scope that are not in the shared store yet."""

    async def withdraw(self, scope: str, names: Iterable[str]) -> None:
        """Forget contributions on this node, and give up the uploads that they wait for."""

    async def refresh(self, scope: str) -> bool:
        """Take over what other nodes added and removed."""

    async def add(self, contribution: Contribution) -> int | None:
        """Take a contribution in; return its publication, None without a shared store."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What went, or would go.

    Attributes:
        entries: contributions.
        freed_bytes: of layers that nothing else names.
    """

    entries: tuple[EntrySummary, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Promoted:
    """What a promotion did.

    Attributes:
        entries: contributions that were copied now.
        refused: contributions of untrusted members, which were left out.
    """

    entries: int
    refused: int


class LayerCacheAdmin:
    """Work on the layer cache of one project. Belongs to the event loop."""

    def __init__(
        self,
        store: ProjectStore,
        scopes: LocalScopes,
        in_thread: InThread,
    ) -> None:
        """Set the project's blobs, its scopes on this node, and who does blocking work."""
        self._store = store
        self._scopes = scopes
        self._in_thread = in_thread
        self._shared: SharedReader | None = None
        if store.objects is not None:
            self._shared = SharedReader(store.project_id, store.objects)

    @property
    def has_shared_store(self) -> bool:
        """Whether entries of all nodes are in one store."""
        return self._shared is not None

    async def measure(self) -> tuple[SharedContents, datetime | None]:
        """Return what the shared store has, and when it was last collected.

        Without a shared store these are the entries of this node.

        Raises:
            CacheUnavailableError: the shared store does not answer.
        """
        if self._shared is None or self._store.objects is None:
            return SharedContents(entries=await self._own()), None
        contents = await self._shared.measure()
        contents.entries = _with(contents.entries, await self._own())
        report = await read_report(self._store.objects)
        return contents, None if report is None else report.at

    async def own_entries(self) -> list[EntrySummary]:
        """Return the entries that only this node has: all without a shared store."""
        return await self._own()

    async def _contents(self, *, node_only: bool) -> SharedContents:
        if self._shared is None or node_only:
            return SharedContents(entries=await self._own())
        contents = await self._shared.entries()
        contents.entries = _with(contents.entries, await self._own())
        return contents

    async def _own(self) -> list[EntrySummary]:
        scopes = await self._scopes.scopes()
        await self._scopes.load(scopes)
        found = []
        for name in scopes:
            members = list(self._scopes.members(name))
            if self._shared is not None:
                waiting = await self._scopes.waiting(name)
                members = [member for member in members if member.contribution_id in waiting]
            wanted = [member.contribution_id for member in members]
            for data in (await self._scopes.documents(name, wanted)).values():
                contribution = await self._parse(data)
                used = self._scopes.last_use(name, contribution.key)
                found.append(
                    EntrySummary.of_contribution(contribution, datetime.fromtimestamp(used, UTC))
                )
        return found

    async def _parse(self, data: bytes) -> Contribution:
        return await self._in_thread(lambda: Contribution.from_bytes(data))

    # -- prune

    async def prune(
        self, wanted: EntryFilter, *, dry_run: bool = False, node_only: bool = False
    ) -> Pruned:
        """Remove entries, or say what would go.

        Args:
            wanted: what goes.
            dry_run: only say.
            node_only: leave the shared store alone.

        Raises:
            CacheUnavailableError: the shared store does not answer; a part may have been removed.
        """
        contents = await self._contents(node_only=node_only)
        if node_only and self._shared is not None and wanted.keep_bytes:
            # What this node has not uploaded is the newest of all; the others decide.
            gone = []
        else:
            gone = select(contents.entries, wanted, datetime.now(UTC))
        freed = freed_layers(contents.entries, gone, contents.image_layers)
        if node_only and self._shared is not None:
            freed = {}  # other entries of the shared store may name them
        if not dry_run:
            await self._remove(gone, freed)
            if self._shared is not None:
                await self._hear_of_removals(wanted.scope)
        return Pruned(tuple(gone), sum(freed.values()))

    async def _remove(self, gone: Sequence[EntrySummary], freed: dict[str, int]) -> None:
        by_scope: dict[str, list[str]] = {}
        for entry in gone:
            by_scope.setdefault(entry.scope, []).append(entry.entry_id)
        for scope, names in by_scope.items():
            # First here, so that nothing which waits is uploaded after it was removed.
            await self._scopes.withdraw(scope, names)
        if self._store.objects is not None:
            await self._retire(self._store.objects, gone)
        else:
            # Nobody else can have them: there is no grace to wait for.
            disk = self._store.disk
            await self._in_thread(
                lambda: [disk.delete_unused(digest, _FOREVER) for digest in freed]
            )
        if gone:
            _log.info("cache.entries.removed", project_id=self._store.project_id, entries=len(gone))

    async def _retire(self, objects: ObjectStore, gone: Iterable[EntrySummary]) -> None:
        async def retire(entry: EntrySummary) -> None:
            await retire_contribution(objects, self._store.project_id, entry.scope, entry.entry_id)

        await for_each(list(gone), retire, parallel=_PARALLEL)

    async def _hear_of_removals(self, scope: str) -> None:
        for name in [scope] if scope else await self._scopes.scopes():
            await self._scopes.refresh(name)

    # -- promote

    async def promote(self, from_scope: str, to_scope: str, *, node_only: bool = False) -> Promoted:
        """Copy the entries of one scope to another; what the other has already is left alone.

        Entries of untrusted members are left out, whichever scope they are in.

        Args:
            from_scope: with the entries.
            to_scope: that gets them.
            node_only: only entries that this node has and the shared store has not.

        Raises:
            CacheUnavailableError: the shared store does not answer.
            QuotaExceededError: the disk is full.
        """
        entries = (await self._contents(node_only=node_only)).entries
        there = {entry.entry_id for entry in entries if entry.scope == to_scope}
        refused = 0
        publications = []
        for entry in entries:
            if entry.scope != from_scope:
                continue
            if entry.writer.role not in TRUSTED_WRITERS:
                refused += 1
            elif entry.entry_id not in there:
                contribution = await self._read(entry)
                if contribution is not None:
                    copy = replace(contribution, scope=to_scope, promoted_from=from_scope)
                    publications.append(await self._scopes.add(copy))
        await self._wait_published(publications)
        return Promoted(len(publications), refused)

    async def _read(self, entry: EntrySummary) -> Contribution | None:
        documents = await self._scopes.documents(entry.scope, [entry.entry_id])
        data = documents.get(entry.entry_id)
        try:
            if data is None and self._store.objects is not None:
                key = contribution_key(self._store.project_id, entry.scope, entry.entry_id)
                data = await self._store.objects.read_bytes(key, max_bytes=MAX_CONTRIBUTION_BYTES)
            return None if data is None else await self._parse(data)
        except (NotFoundError, UsageError):
            return None  # removed meanwhile

    async def _wait_published(self, publications: Sequence[int | None]) -> None:
        uploads = self._store.uploads
        if uploads is None:
            return
        await asyncio.gather(
            *(
                uploads.wait_published(number, PUBLISH_SECONDS)
                for number in publications
                if number is not None
            )
        )


def _with(shared: list[EntrySummary], own: list[EntrySummary]) -> list[EntrySummary]:
    """Return entries of the shared store and those that wait for their upload, each once."""
    known = {(entry.scope, entry.entry_id) for entry in shared}
    return [*shared, *(entry for entry in own if (entry.scope, entry.entry_id) not in known)]

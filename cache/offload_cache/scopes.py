"""Cache scopes of a project: what builds have contributed, here and on other nodes.

A scope ("main", a branch) holds a set of contributions, so that targets of a bake file, parallel
builds and different states of one build add to each other. A contribution is in the node's index
at once and in the shared store as soon as its blobs are.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self, TypeVar

import structlog

from offload_cache.contributions import CacheLayer, Contribution, Writer
from offload_cache.keys import contribution_key, new_contribution_id
from offload_cache.manifests import parse_cache_manifest
from offload_cache.scopetable import MAX_PER_SCOPE, Member, ScopeTable
from offload_cache.sharedscopes import SharedScopes
from offload_cache.unify import read_part
from offload_cache.unify.records import MAX_CONFIG_BYTES
from offload_cache.uploadtable import UploadItem
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from offload_cache.database import CacheDatabase
    from offload_cache.manifests import Manifest
    from offload_cache.tiered import ProjectStore
    from offload_cache.unify import Part

_log = structlog.get_logger(__name__)

_MAX_REMEMBERED_SCOPES = 500
_USES_SECONDS = 600.0
_MARK_SECONDS = 86400.0
_PACK_JITTER_SECONDS = 5.0
_NEVER = float("-inf")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Published:
    """A contribution that a scope took in, or has already.

    Attributes:
        contribution: readable on this node at once.
        publication: number for `UploadQueue.wait_published`; None without a shared store, or when
            there is nothing to wait for.
        added: False when an earlier contribution of the key has all of it.
    """

    contribution: Contribution
    publication: int | None
    added: bool


@dataclass(slots=True)
class _Scope:
    """What is in memory of a scope; `version` changes with its members."""

    members: tuple[Member, ...] = ()
    version: int = 0
    loaded: bool = False
    listed_at: float = _NEVER
    uses_at: float = _NEVER
    uses: dict[str, float] = field(default_factory=dict)
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)


class ScopeIndex:
    """The contributions of one project's scopes, in the node's index and in the shared store.

    An async context manager; used from one event loop.

    Args:
        database: the node's index.
        store: the project's blobs.
        executor: for reading and checking documents.
    """

    def __init__(
        self, database: CacheDatabase, store: ProjectStore, executor: ThreadPoolExecutor
    ) -> None:
        self._store = store
        self._executor = executor
        self._table = ScopeTable(database, store.project_id)
        self._shared: SharedScopes | None = None
        if store.objects is not None:
            self._shared = SharedScopes(store.project_id, store.objects, executor)
        self._scopes: OrderedDict[str, _Scope] = OrderedDict()
        self._listeners: list[Callable[[str, str | None], Awaitable[None]]] = []
        self._packing: set[str] = set()
        self._marking: set[tuple[str, str]] = set()
        self._tasks = TaskSet(on_error=self._crashed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.close()

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        if isinstance(error, CacheUnavailableError):
            _log.info("cache.scopes.task_failed", task=name, cause=error.message)
        else:
            _log.error("cache.scopes.task_failed", task=name, error=repr(error))

    def on_change(self, listener: Callable[[str, str | None], Awaitable[None]]) -> None:
        """Have `listener(scope, key)` awaited when a scope's members have changed.

        `key` is that of a contribution of this node, None for anything else.
        """
        self._listeners.append(listener)

    async def _changed(self, scope: str, key: str | None) -> None:
        for listener in self._listeners:
            await listener(scope, key)

    # -- what builds of this node add

    async def publish(self, scope: str, key: str, manifest: bytes, *, writer: Writer) -> Published:
        """Add a build's cache manifest: here at once, for other nodes in the background.

        Nothing is added when the newest contribution of the key has all its records, and a result
        that can be had for each record that has one here.

        Args:
            scope: where to.
            key: tells builds of one scope apart.
            manifest: as BuildKit exported it; its configuration is on this node's disk.
            writer: who wrote it.

        Raises:
            UsageError: this is no cache manifest that BuildKit would import, or a name is invalid.
            NotFoundError: the configuration is not here.
            QuotaExceededError: the disk is full.
        """
        parsed = parse_cache_manifest(manifest)
        if parsed.config is None:
            raise UsageError("the cache manifest names no configuration")
        records = await self._store.read_blob(parsed.config.digest, max_bytes=MAX_CONFIG_BYTES)
        await self._store.settle(layer.digest for layer in parsed.layers)
        created_at = datetime.now(UTC)
        contribution = Contribution(
            contribution_id=new_contribution_id(created_at, writer.build_id),
            scope=scope,
            key=key,
            created_at=created_at,
            writer=writer,
            layers=self._layers(parsed),
            records=records,
        )
        part, document = await self._in_thread(
            lambda: (read_part(records, contribution.layers), contribution.to_bytes())
        )
        known = await self._covering(scope, key, part)
        if known is not None:
            publication = await self._table.publication(scope, known.contribution_id)
            _log.info("cache.contribution.known", scope=scope, key=key, build_id=writer.build_id)
            return Published(known, publication, added=False)
        state = await self._loaded(scope)
        async with state.gate:
            publication = await self._take_in(state, contribution, document)
        _log.info(
            "cache.contribution.added",
            scope=scope,
            key=key,
            build_id=writer.build_id,
            records=len(part.records),
            layers=len(contribution.layers),
        )
        await self._changed(scope, key)
        return Published(contribution, publication, added=True)

    def _layers(self, manifest: Manifest) -> tuple[CacheLayer, ...]:
        """Return the layers that other builds can have: here, or known to be shared."""
        disk, presence = self._store.disk, self._store.presence
        found = {}
        for raw, layer in zip(manifest.document["layers"], manifest.layers, strict=True):
            known = presence.get(layer.digest)
            size_bytes = disk.size(layer.digest)
            if size_bytes is None and known is not None and presence.is_present(layer.digest):
                size_bytes = known.size_bytes
            if size_bytes is None or layer.foreign:
                continue
            if size_bytes != layer.size_bytes:
                raise UsageError(f"the cache manifest is wrong about the size of {layer.digest}")
            annotations = raw.get("annotations") or {}
            if not isinstance(annotations, dict) or not all(
                isinstance(value, str) for value in annotations.values()
            ):
                raise UsageError("the cache manifest has annotations that are no texts")
            found[layer.digest] = CacheLayer(
                layer.digest, layer.size_bytes, layer.media_type, annotations
            )
        return tuple(sorted(found.values(), key=lambda layer: layer.digest))

    async def _covering(self, scope: str, key: str, part: Part) -> Contribution | None:
        """Return the newest contribution of a key if a part adds nothing to it."""
        state = await self._loaded(scope)
        newest = next((member for member in state.members if member.key == key), None)
        contribution = await self.read(scope, newest.contribution_id) if newest else None
        if contribution is None:
            return None
        other = await self._in_thread(lambda: read_part(contribution.records, contribution.layers))
        for name, record in part.records.items():
            known = other.records.get(name)
            if known is None:
                return None
            if record.results and not any(self._is_whole(other, r.chain) for r in known.results):
                return None
        return contribution

    def _is_whole(self, part: Part, chain: bytes) -> bool:
        at: bytes | None = chain
        while at is not None:
            blob, at = part.chains[at]
            if blob not in part.layers or not self._store.is_offerable(blob):
                return False
        return True

    # -- reading

    async def load(self, scopes: Iterable[str]) -> None:
        """Have the node's index of scopes in memory; asks the shared store nothing."""
        for scope in scopes:
            await self._loaded(scope)

    async def _loaded(self, scope: str) -> _Scope:
        state = self._state(scope)
        if not state.loaded:
            async with state.gate:
                if not state.loaded:
                    state.uses = await self._table.uses(scope)
                    await self._reload(scope, state)
                    state.loaded = True
        return state

    def _state(self, scope: str) -> _Scope:
        state = self._scopes.get(scope)
        if state is None:
            state = self._scopes[scope] = _Scope()
            while len(self._scopes) > _MAX_REMEMBERED_SCOPES:
                self._scopes.popitem(last=False)
        self._scopes.move_to_end(scope)
        return state

    async def _reload(self, scope: str, state: _Scope) -> bool:
        members = tuple(await self._table.members(scope))
        changed = members != state.members
        if changed:
            state.members = members
            state.version += 1
        return changed

    def members(self, scope: str) -> tuple[Member, ...]:
        """Return what is known of a loaded scope, newest first."""
        return self._state(scope).members

    def last_use(self, scope: str, key: str) -> float:
        """Return when a key was last of use to a build; 0 when nobody said."""
        return self._state(scope).uses.get(key, 0.0)

    def listing_age(self, scope: str) -> float:
        """Return the seconds since the shared store was last asked; 0 without one."""
        if self._shared is None:
            return 0.0
        return time.monotonic() - self._state(scope).listed_at

    async def scopes(self) -> list[str]:
        """Return the scopes that this node knows contributions of."""
        return await self._table.scopes()

    async def read(self, scope: str, contribution_id: str) -> Contribution | None:
        """Return a contribution with its records; None when this node does not have it."""
        documents = await self._table.documents(scope, [contribution_id])
        if contribution_id not in documents:
            return None
        return await self._in_thread(lambda: Contribution.from_bytes(documents[contribution_id]))

    async def documents(self, scope: str, names: Sequence[str]) -> dict[str, bytes]:
        """Return documents of this node by contribution."""
        return await self._table.documents(scope, names)

    async def waiting(self, scope: str) -> set[str]:
        """Return the contributions of a scope that are not in the shared store yet."""
        return await self._table.waiting(scope)

    async def add(self, contribution: Contribution) -> int | None:
        """Take in a contribution that is known elsewhere, here at once as `publish` does.

        Returns:
            The number to wait for with `UploadQueue.wait_published`, None without a shared store.

        Raises:
            UsageError: a name is invalid.
            QuotaExceededError: the disk is full.
        """
        document = await self._in_thread(contribution.to_bytes)
        state = await self._loaded(contribution.scope)
        async with state.gate:
            publication = await self._take_in(state, contribution, document)
        await self._changed(contribution.scope, contribution.key)
        return publication

    async def _take_in(
        self, state: _Scope, contribution: Contribution, document: bytes
    ) -> int | None:
        """Keep a contribution and queue its upload; the scope's gate is held."""
        scope, name = contribution.scope, contribution.contribution_id
        object_key = contribution_key(self._store.project_id, scope, name)
        await self._table.add([(contribution, document)], listed=False)
        item = UploadItem.for_document(1, object_key, document)
        blobs = [digest for digest, _ in contribution.blobs]
        publication = await self._store.publish(object_key, [blobs, [item]])
        if publication is not None:
            await self._table.set_publication(scope, name, publication)
        await self._reload(scope, state)
        return publication

    async def withdraw(self, scope: str, names: Iterable[str]) -> None:
        """Forget contributions on this node, and give up the uploads that they wait for."""
        chosen = list(names)
        uploads = self._store.uploads
        for name in chosen:
            publication = await self._table.publication(scope, name)
            if publication is not None and uploads is not None:
                await uploads.withdraw(publication)
        await self.remove(scope, chosen)

    async def remove(self, scope: str, names: Iterable[str]) -> None:
        """Forget contributions on this node; what the shared store lists comes back."""
        state = await self._loaded(scope)
        async with state.gate:
            await self._table.remove(scope, list(names))
            changed = await self._reload(scope, state)
        if changed:
            await self._changed(scope, None)

    # -- the shared store

    async def refresh(self, scope: str) -> bool:
        """Take over what other nodes added and removed; return whether anything changed.

        Without an answer of the shared store nothing changes.
        """
        state = await self._loaded(scope)
        if self._shared is None or not self._shared.reachable:
            return False
        asked_at = time.monotonic()
        async with state.gate:
            if state.listed_at >= asked_at:
                return False  # another caller has just done it
            try:
                changed = await self._refresh(self._shared, scope, state)
            except CacheUnavailableError as error:
                _log.info("cache.scope.not_refreshed", scope=scope, cause=error.message)
                return False
        if changed:
            await self._changed(scope, None)
        if state.members and scope not in self._packing:
            self._packing.add(scope)
            self._tasks.start(self._pack(self._shared, scope, state), name=f"pack {scope}")
        return changed

    async def _refresh(self, shared: SharedScopes, scope: str, state: _Scope) -> bool:
        # Before the listing: what is uploaded meanwhile must not be taken for removed.
        waiting = await self._table.waiting(scope)
        names = await shared.names(scope)
        if time.monotonic() - state.uses_at > _USES_SECONDS:
            await self._table.note_uses(scope, await shared.uses(scope))
            state.uses = await self._table.uses(scope)
            state.uses_at = time.monotonic()
        listed = set(names)
        known = {member.contribution_id: member for member in state.members}
        gone = known.keys() - listed - waiting
        if gone:
            await self._table.remove(scope, gone)
            _log.info("cache.contributions.removed", scope=scope, count=len(gone))
        seen = [name for name in names if name in known and not known[name].listed]
        if seen:
            await self._table.set_listed(scope, seen)
        # What waits here counts, too: older ones would be read only to be dropped again.
        room = set(sorted(listed | waiting)[:MAX_PER_SCOPE])
        missing = [name for name in names if name not in known and name in room]
        if missing:
            read = await shared.read(scope, missing)
            await self._table.add(read, listed=True)
        state.listed_at = time.monotonic()
        return await self._reload(scope, state)

    async def _pack(self, shared: SharedScopes, scope: str, state: _Scope) -> None:
        try:
            names = [member.contribution_id for member in state.members if member.listed]
            if not await shared.is_packing_due(scope, names):
                return
            # All nodes notice at the same time; one of them is enough.
            await asyncio.sleep(random.uniform(0, _PACK_JITTER_SECONDS))  # noqa: S311
            names = [member.contribution_id for member in state.members if member.listed]
            if await shared.is_packing_due(scope, names):
                documents = await self._table.documents(scope, names)
                await shared.write_packed(
                    scope, [(name, documents[name]) for name in names if name in documents]
                )
        finally:
            self._packing.discard(scope)

    # -- marks of use

    def note_use(self, scopes: Iterable[str], key: str) -> None:
        """Note that a build imports what these scopes have for its key; returns at once.

        The mark is written to the shared store at most once a day and key.
        """
        for scope in scopes:
            state = self._state(scope)
            fresh = time.time() - state.uses.get(key, 0.0) < _MARK_SECONDS
            if fresh or not any(member.key == key for member in state.members):
                continue
            if (scope, key) not in self._marking:
                self._marking.add((scope, key))
                self._tasks.start(self._mark(scope, key, state), name=f"mark {scope}")

    async def _mark(self, scope: str, key: str, state: _Scope) -> None:
        try:
            used_at = time.time()
            if self._shared is not None:
                used_at = await self._shared.mark_use(scope, key)
            await self._table.note_uses(scope, [(key, used_at)])
            state.uses[key] = used_at
        finally:
            self._marking.discard((scope, key))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

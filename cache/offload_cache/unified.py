"""Makes the one import of a set of scopes from their contributions."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_cache.partcache import PartCache
from offload_cache.unify import Choice, Limits, salt_digest
from offload_core.digest import sha256_digest
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from offload_cache.scopes import ScopeIndex
    from offload_cache.scopetable import Member
    from offload_cache.tiered import ProjectStore
    from offload_cache.unify import Part, Rendered, Unified

_log = structlog.get_logger(__name__)

_BATCH = 16

Name = tuple[str, str]  # scope, contribution


@dataclass(frozen=True, slots=True)
class UnifiedImport:
    """One import, ready to be served.

    Attributes:
        rendered: the documents; the configuration's blob was put on the node's disk.
        body: the manifest with all its layers.
        digest: of `body`.
        contributions: identifiers of those in it, in order of preference.
        own_key: whether one of them has the build's own key.
        missing: layers that would be of use and could not be had.
    """

    rendered: Rendered
    body: bytes
    digest: str
    contributions: tuple[str, ...]
    own_key: bool
    missing: frozenset[str]


class Unifier:
    """Chooses, reads and unites contributions; heavy work is done in a thread.

    Args:
        store: the project's blobs.
        scopes: the project's contributions.
        executor: for reading and uniting.
        limits: bounds of an import.
    """

    def __init__(
        self,
        store: ProjectStore,
        scopes: ScopeIndex,
        executor: ThreadPoolExecutor,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._scopes = scopes
        self._executor = executor
        self._limits = limits or Limits()
        self._parts = PartCache()
        self._salt = salt_digest(store.project_id)

    async def make(self, read_scopes: Sequence[str], key: str) -> UnifiedImport:
        """Unite what scopes have.

        Raises:
            QuotaExceededError: the disk is full.
        """
        started = time.monotonic()
        await self._scopes.load(read_scopes)
        order = self._order(read_scopes, key)
        choice: Choice[Name] = Choice(self._limits)
        for start in range(0, len(order), _BATCH):
            batch = [(scope, member.contribution_id) for scope, member in order[start:][:_BATCH]]
            parts, documents = await self._read(batch)
            await self._choose(choice, batch, parts, documents)
            if choice.full:
                break
        await self._trust(choice, {(scope, m.contribution_id): m for scope, m in order})
        loop = asyncio.get_running_loop()
        unified = await loop.run_in_executor(self._executor, self._unite, choice)
        rendered = unified.rendered
        await self._store.put_blob(rendered.config, rendered.config_digest)
        keys = {(scope, member.contribution_id): member.key for scope, member in order}
        body = rendered.manifest()
        _log.info(
            "cache.import.unified",
            contributions=len(unified.used),
            known=len(order),
            records=rendered.record_count,
            layers=len(rendered.layers),
            missing=len(unified.missing),
            milliseconds=round((time.monotonic() - started) * 1000),
        )
        return UnifiedImport(
            rendered=rendered,
            body=body,
            digest=sha256_digest(body),
            contributions=tuple(name for _, name in unified.used),
            own_key=any(keys[name] == key for name in unified.used),
            missing=unified.missing,
        )

    def _order(self, read_scopes: Sequence[str], key: str) -> list[tuple[str, Member]]:
        """Return all contributions, the most useful for the build first.

        These are those of its own key, in the order of the scopes and newest first; then the
        others by the last use of their key, for they may share steps with it.
        """
        own: list[tuple[str, Member]] = []
        others: list[tuple[float, str, str, Member]] = []
        for scope in dict.fromkeys(read_scopes):
            seen: set[str] = set()
            for member in self._scopes.members(scope):
                if member.key == key:
                    own.append((scope, member))
                    continue
                used_at = member.created_at
                if member.key not in seen:  # of one key the newest is what builds use
                    seen.add(member.key)
                    used_at = max(used_at, self._scopes.last_use(scope, member.key))
                others.append((-used_at, member.contribution_id, scope, member))
        others.sort(key=lambda item: item[:3])
        return own + [(scope, member) for _, _, scope, member in others]

    async def _read(self, batch: Sequence[Name]) -> tuple[dict[Name, Part], dict[Name, bytes]]:
        """Return what was parsed before, and the documents of all others."""
        known = {name: part for name in batch if (part := self._parts.get(name)) is not None}
        found: dict[Name, bytes] = {}
        for scope in dict.fromkeys(scope for scope, _ in batch):
            names = [n for s, n in batch if s == scope and (s, n) not in known]
            if names:
                documents = await self._scopes.documents(scope, names)
                found.update({(scope, name): body for name, body in documents.items()})
        return known, found

    async def _choose(
        self,
        choice: Choice[Name],
        batch: Sequence[Name],
        parts: Mapping[Name, Part],
        documents: Mapping[Name, bytes],
    ) -> None:
        def work() -> None:
            for name in batch:
                if choice.full:
                    return
                # Not from the cache: parts of another import may have taken its place there.
                part = parts.get(name)
                if part is None:
                    if name not in documents:
                        continue  # removed meanwhile
                    try:
                        part = self._parts.read(name, documents[name])
                    except UsageError as error:
                        _log.warning(
                            "cache.contribution.ignored", scope=name[0], cause=error.message
                        )
                        continue
                choice.add(name, part)

        await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _trust(self, choice: Choice[Name], members: dict[Name, Member]) -> None:
        """Count the layers of listed contributions as shared: they were there before those."""
        if self._store.objects is None:
            return
        blobs: dict[str, tuple[float, int]] = {}
        for name, part in choice.chosen:
            if members[name].listed:
                since = members[name].created_at
                for digest, layer in part.layers.items():
                    if digest not in blobs or blobs[digest][0] < since:
                        blobs[digest] = (since, layer.size_bytes)
        by_time: dict[float, list[tuple[str, int]]] = {}
        for digest, (since, size_bytes) in blobs.items():
            by_time.setdefault(since, []).append((digest, size_bytes))
        for since, some in by_time.items():
            await self._store.presence.trust(some, since=since)

    def _unite(self, choice: Choice[Name]) -> Unified[Name]:
        return choice.unify(salt=self._salt, available=self._store.is_offerable)

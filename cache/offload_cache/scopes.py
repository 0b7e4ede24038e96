"""Cache scopes of a project: who published which cache manifest, and what a build may find.

A scope ("main", a branch) holds a set of entries, one per key, so that the targets of a bake file
and parallel builds do not overwrite each other. Entries live in the node's index at once and in the
shared store as soon as their blobs do.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from offload_cache.entries import MAX_ENTRY_BYTES, CacheEntry
from offload_cache.keys import entry_key, scope_prefix
from offload_cache.manifests import parse_cache_manifest
from offload_cache.uploadtable import UploadItem
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from offload_cache.database import CacheDatabase
    from offload_cache.objectstore import ObjectStore
    from offload_cache.tiered import ProjectStore

_log = structlog.get_logger(__name__)

_REMEMBER_SECONDS = 10.0
_ANSWER_SECONDS = 2.0
_MAX_LISTED = 1_000
_NEWEST_TRIED = 3
_MAX_LOCAL_ENTRIES = 5_000


@dataclass(frozen=True, slots=True)
class Published:
    """A manifest that a scope took in.

    Attributes:
        entry: readable on this node at once.
        publication: number for `UploadQueue.wait_published`; None without a shared store.
    """

    entry: CacheEntry
    publication: int | None


class ScopeIndex:
    """The entries of one project's scopes, in the node's index and in the shared store."""

    def __init__(self, database: CacheDatabase, store: ProjectStore) -> None:
        self._database = database
        self._store = store
        self._remembered: dict[str, tuple[float, CacheEntry | None]] = {}
        self._listed: dict[str, tuple[float, list[CacheEntry]]] = {}

    async def publish(
        self, scope: str, key: str, manifest: bytes, *, build_id: str, member: str
    ) -> Published:
        """Make a build's cache manifest an entry: here at once, for other nodes in the background.

        Raises:
            UsageError: this is no cache manifest, or a name is invalid.
            QuotaExceededError: the disk is full.
        """
        parsed = parse_cache_manifest(manifest)
        if parsed.config is None:
            raise UsageError("the cache manifest names no configuration")
        object_key = entry_key(self._store.project_id, scope, key)
        digest = await self._store.put_blob(manifest)
        there = [blob for blob in parsed.blobs if self._store.is_offerable(blob.digest)]
        entry = CacheEntry(
            scope=scope,
            key=key,
            manifest_digest=digest,
            media_type=parsed.media_type,
            size_bytes=len(manifest),
            config_digest=parsed.config.digest,
            blobs=tuple(sorted((blob.digest, blob.size_bytes) for blob in there)),
            created_at=datetime.now(UTC),
            build_id=build_id,
            member=member,
        )
        document = entry.to_json()
        await self._keep([entry])
        self._remembered.pop(object_key, None)
        self._listed.pop(scope, None)
        publication = await self._store.publish(
            object_key,
            [
                [blob.digest for blob in there],
                [digest],
                [UploadItem.for_document(2, object_key, document)],
            ],
        )
        _log.info(
            "cache.entry.published", scope=scope, key=key, blobs=len(there), build_id=build_id
        )
        return Published(entry, publication)

    async def candidates(self, read_scopes: Sequence[str], key: str) -> list[CacheEntry]:
        """Return the entries that a build may use, best first.

        These are the entries with the build's own key, in the order of the scopes; when no scope
        has one, the newest entries of the first scope that has any. The shared store gets a short
        time to answer; without an answer the node's own entries are all there is.
        """
        own = await self._local(read_scopes, key)
        shared = await asyncio.gather(*(self._shared_entry(scope, key) for scope in read_scopes))
        exact = [
            entry
            for scope, found in zip(read_scopes, shared, strict=True)
            if (entry := _newest(own.get(scope), found)) is not None
        ]
        if exact:
            await self._trust(entry for entry in exact if entry in shared)
            return exact
        lists = await asyncio.gather(*(self._shared_newest(scope) for scope in read_scopes))
        for scope, listed in zip(read_scopes, lists, strict=True):
            entries = {entry.key: entry for entry in await self._local_newest(scope)}
            for entry in listed:
                entries[entry.key] = _newest(entries.get(entry.key), entry) or entry
            if entries:
                ordered = sorted(entries.values(), key=lambda entry: entry.created_at, reverse=True)
                await self._trust(entry for entry in ordered if entry in listed)
                return ordered[:_NEWEST_TRIED]
        return []

    async def _trust(self, entries: Iterable[CacheEntry]) -> None:
        # An entry in the shared store was written after its blobs: no HEAD per layer is needed.
        for entry in entries:
            blobs = [*entry.blobs, (entry.manifest_digest, entry.size_bytes)]
            await self._store.presence.trust(blobs, since=entry.created_at.timestamp())

    # -- entries of the shared store

    async def _shared_entry(self, scope: str, key: str) -> CacheEntry | None:
        object_key = entry_key(self._store.project_id, scope, key)
        remembered = self._remembered.get(object_key)
        if remembered is not None and remembered[0] > time.monotonic():
            return remembered[1]
        objects = self._store.objects
        if objects is None or not objects.reachable:
            return None
        try:
            entry = await self._read_entry(objects, object_key)
        except CacheUnavailableError:
            return None  # not remembered: the next build asks again
        self._remember(object_key, entry)
        if entry is not None:
            await self._keep([entry])
        return entry

    async def _read_entry(self, objects: ObjectStore, object_key: str) -> CacheEntry | None:
        try:
            data = await objects.read_bytes(
                object_key, max_bytes=MAX_ENTRY_BYTES, timeout=_ANSWER_SECONDS
            )
            entry = CacheEntry.from_json(data)
        except NotFoundError:
            return None
        except UsageError as error:
            _log.warning("cache.entry.ignored", object_key=object_key, cause=error.message)
            return None
        if entry_key(self._store.project_id, entry.scope, entry.key) != object_key:
            _log.warning("cache.entry.ignored", object_key=object_key, cause="it names another")
            return None
        return entry

    def _remember(self, object_key: str, entry: CacheEntry | None) -> None:
        now = time.monotonic()
        if len(self._remembered) > _MAX_LOCAL_ENTRIES:
            self._remembered = {k: v for k, v in self._remembered.items() if v[0] > now}
        self._remembered[object_key] = (now + _REMEMBER_SECONDS, entry)

    async def _shared_newest(self, scope: str) -> list[CacheEntry]:
        remembered = self._listed.get(scope)
        if remembered is not None and remembered[0] > time.monotonic():
            return remembered[1]
        objects = self._store.objects
        if objects is None or not objects.reachable:
            return []
        prefix = scope_prefix(self._store.project_id, scope)
        try:
            found = await objects.list_objects(prefix, limit=_MAX_LISTED, timeout=_ANSWER_SECONDS)
            newest = sorted(found, key=lambda info: info.modified_at, reverse=True)[:_NEWEST_TRIED]
            read = await asyncio.gather(*(self._read_entry(objects, info.key) for info in newest))
        except CacheUnavailableError:
            return []
        entries = [entry for entry in read if entry is not None]
        self._listed[scope] = (time.monotonic() + _REMEMBER_SECONDS, entries)
        await self._keep(entries)
        return entries

    # -- entries of this node's index

    async def _keep(self, entries: Sequence[CacheEntry]) -> None:
        project_id = self._store.project_id
        rows = [
            (project_id, e.scope, e.key, e.to_json(), e.created_at.timestamp()) for e in entries
        ]
        if not rows:
            return

        def work(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " document = excluded.document, created_at = excluded.created_at"
                " WHERE excluded.created_at >= entries.created_at",
                rows,
            )
            connection.execute(
                "DELETE FROM entries WHERE project = ?1 AND created_at < (SELECT created_at FROM"
                " entries WHERE project = ?1 ORDER BY created_at DESC LIMIT 1 OFFSET ?2)",
                (project_id, _MAX_LOCAL_ENTRIES),
            )

        await self._database.run(work)

    async def _local(self, scopes: Sequence[str], key: str) -> dict[str, CacheEntry]:
        project_id = self._store.project_id

        def work(connection: sqlite3.Connection) -> list[bytes]:
            found = []
            for scope in scopes:
                row = connection.execute(
                    "SELECT document FROM entries WHERE project = ? AND scope = ? AND key = ?",
                    (project_id, scope, key),
                ).fetchone()
                if row is not None:
                    found.append(row[0])
            return found

        entries = [CacheEntry.from_json(data) for data in await self._database.run(work)]
        return {entry.scope: entry for entry in entries}

    async def _local_newest(self, scope: str) -> list[CacheEntry]:
        rows = await self._database.run(
            lambda connection: connection.execute(
                "SELECT document FROM entries WHERE project = ? AND scope = ?"
                " ORDER BY created_at DESC LIMIT ?",
                (self._store.project_id, scope, _NEWEST_TRIED),
            ).fetchall()
        )
        return [CacheEntry.from_json(row[0]) for row in rows]


def _newest(one: CacheEntry | None, other: CacheEntry | None) -> CacheEntry | None:
    if one is None or other is None:
        return one or other
    return one if one.created_at > other.created_at else other

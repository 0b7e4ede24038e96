"""Telling the pool about base images: their blobs go to the shared store, under a root document.

Collection keeps what a document in `images/` names. The document in `bases/` says to nodes that
have not met a name what it last meant, for the time that its registry does not answer.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson
import structlog

from offload_cache.keys import base_key, image_key
from offload_cache.mirror.errors import UpstreamError
from offload_cache.mirror.names import KnownName
from offload_cache.uploadtable import UploadItem
from offload_core.digest import is_digest
from offload_core.errors import CacheUnavailableError, NotFoundError

if TYPE_CHECKING:
    from offload_cache.mirror.content import BaseContent
    from offload_cache.mirror.names import NameTable
    from offload_cache.tiered import ProjectStore
    from offload_core.aio import TaskSet

_log = structlog.get_logger(__name__)

QUIET_SECONDS = 1.0
REFRESH_SECONDS = 86_400.0
"""A document in use is written again after so long, so that its age says when it was last used."""
_VERSION = 1
_MAX_DOCUMENT_BYTES = 64 << 10
_ASK_SECONDS = 2.0
_MAX_REMEMBERED = 10_000
_NAMES_AT_ONCE = 16


@dataclass(slots=True)
class _Image:
    """What documents say: the blobs of each manifest with their bytes, and all of them."""

    roots: dict[str, dict[str, int]] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)


class BaseRoots:
    """Writes the documents of one project's base images.

    Args:
        store: of the project; without a shared store nothing is written.
        names: of the project.
        content: of the project.
        tasks: for writing; its owner ends them.
    """

    def __init__(
        self, store: ProjectStore, names: NameTable, content: BaseContent, tasks: TaskSet
    ) -> None:
        self._store = store
        self._names = names
        self._content = content
        self._tasks = tasks
        self._changed: dict[str, float] = {}
        self._writing: asyncio.Task[None] | None = None
        self._written: dict[str, frozenset[str]] = {}

    def changed(self, repository: str) -> None:
        """Note that a name was looked up or content was read; documents follow when it is quiet."""
        if self._store.uploads is None:
            return
        self._changed[repository] = time.monotonic()
        if self._writing is None or self._writing.done():
            self._writing = self._tasks.start(self._write_soon(), name="base image documents")

    async def _write_soon(self) -> None:
        while self._changed:
            await asyncio.sleep(QUIET_SECONDS)
            now = time.monotonic()
            for repository, at in list(self._changed.items()):
                if now - at < QUIET_SECONDS:
                    continue
                del self._changed[repository]
                for known in await self._names.of_repository(repository, _NAMES_AT_ONCE):
                    await self._write(known)

    async def _write(self, known: KnownName) -> None:
        image = await self._found(known.digest)
        here = frozenset(digest for digest in image.named if self._store.is_offerable(digest))
        recent = time.time() - known.noted_at < REFRESH_SECONDS
        if not here or (recent and self._written.get(known.name) == here):
            return
        project = self._store.project_id
        meaning = {
            "version": _VERSION,
            "name": known.name,
            "manifest": known.digest,
            "checked_at": known.checked_at,
        }
        documents = {base_key(project, known.name): meaning}
        now = datetime.now(UTC).isoformat()
        for digest, blobs in image.roots.items():
            documents[image_key(project, digest)] = {
                "version": _VERSION,
                "kind": "base",
                "name": known.name,
                "digest": digest,
                "build_id": "",
                "blobs": sorted(blobs.items()),
                "created_at": now,
                "used_at": now,
            }
        items = [UploadItem.for_document(1, key, orjson.dumps(it)) for key, it in documents.items()]
        await self._store.publish(f"base {known.name}", [sorted(here), items])
        if len(self._written) >= _MAX_REMEMBERED:
            self._written.clear()
        self._written[known.name] = here
        await self._names.note(known, time.time())
        _log.info("base_images.noted", project_id=project, name=known.name, blobs=len(here))

    async def _found(self, digest: str) -> _Image:
        """Return the documents of an image, one for each of its manifests that was pulled.

        A document names all layers of its manifest, also those that nobody needed yet: nodes write
        the same document whatever each of them has pulled, and none takes away another's layers.
        """
        image = _Image()
        todo: list[tuple[str, dict[str, int]]] = [(digest, {})]
        while todo:
            at, parents = todo.pop()
            if at in image.roots or not self._store.is_offerable(at):
                continue
            try:
                manifest, size_bytes = await self._content.parsed(at)
            except (NotFoundError, UpstreamError):
                continue
            root = {**parents, at: size_bytes}
            todo.extend((child.digest, root) for child in manifest.children)
            image.roots[at] = {**root, **{it.digest: it.size_bytes for it in manifest.blobs}}
            image.named.update(image.roots[at])
        return image

    async def meaning(self, repository: str, reference: str) -> KnownName | None:
        """Return what another node last knew of a name; None when that cannot be learnt."""
        objects = self._store.objects
        if objects is None or not objects.reachable:
            return None
        asked = KnownName(repository, reference, "", 0.0)
        try:
            data = await objects.read_bytes(
                base_key(self._store.project_id, asked.name),
                max_bytes=_MAX_DOCUMENT_BYTES,
                timeout=_ASK_SECONDS,
            )
            raw = orjson.loads(data)
            known = KnownName(repository, reference, raw["manifest"], float(raw["checked_at"]))
            whole = raw["version"] == _VERSION and raw["name"] == asked.name
        except (NotFoundError, CacheUnavailableError):
            return None
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return None
        return known if whole and is_digest(known.digest) else None

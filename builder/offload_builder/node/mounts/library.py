"""Documents of cache mounts in the shared store: which one a build gets, and how one gets there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.mounts.documents import MAX_DOCUMENT_BYTES, MountDocument
from offload_cache.keys import mount_key
from offload_cache.uploadtable import UploadItem
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.node.mounts.naming import MountName
    from offload_cache.tiered import ProjectStore

log = structlog.get_logger(__name__)

_ANSWER_SECONDS = 2.0


class MountLibrary:
    """The stored cache mounts of a project."""

    def __init__(self, store: ProjectStore) -> None:
        self._store = store

    async def find(self, scopes: Sequence[str], name: MountName) -> MountDocument | None:
        """Return the document of the first scope that has one.

        A store that does not answer soon has none.
        """
        found = await asyncio.gather(*(self.read(scope, name) for scope in scopes))
        return next((document for document in found if document is not None), None)

    async def read(self, scope: str, name: MountName) -> MountDocument | None:
        """Return the document of one scope; None when there is none, or none of use."""
        objects = self._store.objects
        if objects is None or not objects.reachable:
            return None
        key = mount_key(self._store.project_id, scope, name.key)
        try:
            data = await objects.read_bytes(
                key, max_bytes=MAX_DOCUMENT_BYTES, timeout=_ANSWER_SECONDS
            )
            document = MountDocument.decode(data)
        except NotFoundError:
            return None
        except (CacheUnavailableError, UsageError) as error:
            log.warning("mounts.document.unreadable", scope=scope, id=name.id, cause=error.message)
            return None
        if document.name != name or document.scope != scope:
            log.warning("mounts.document.unreadable", scope=scope, id=name.id, cause="misplaced")
            return None
        # The document was written after its blobs.
        await self._store.presence.trust(document.blobs, since=document.created_at.timestamp())
        return document

    async def publish(self, document: MountDocument) -> int | None:
        """Queue a document behind its blobs; return the number to wait for.

        Raises:
            UsageError: it is too large.
        """
        body = document.encode()
        if len(body) > MAX_DOCUMENT_BYTES:
            raise UsageError("the document of the cache mount is too large")
        key = mount_key(self._store.project_id, document.scope, document.name.key)
        digests = [digest for digest, _ in document.blobs]
        return await self._store.publish(key, [digests, [UploadItem.for_document(1, key, body)]])

    async def confirm(self, publication: int | None, timeout: float) -> bool:
        """Wait until other nodes can read what was published."""
        uploads = self._store.uploads
        if uploads is None or publication is None:
            return False
        return await uploads.wait_published(publication, timeout)

"""Which blobs of a project a build may give to its client: those of the image that it made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from offload_cache.manifests import MAX_MANIFEST_BYTES
from offload_core.errors import InternalError, NotFoundError
from offload_core.imageindex import INDEX_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from offload_cache.tiered import ProjectStore


class ImageFiles:
    """The closure of one image: index, manifests, configs and layers (OCI image spec)."""

    def __init__(self, store: ProjectStore) -> None:
        self._store = store
        self._media_types: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._below: dict[str, list[tuple[str, int]]] = {}
        self._children: dict[str, list[str]] = {}
        self.publication: int | None = None
        """Number of its way to the shared store; None without one."""

    async def admit(self, digest: str) -> str:
        """Add an image; return the media type of its manifest or index.

        Raises:
            InternalError: a manifest that the node itself stored cannot be read.
        """
        body = await self._store.read_blob(digest, max_bytes=MAX_MANIFEST_BYTES)
        try:
            manifest: dict[str, Any] = json.loads(body)
        except ValueError as error:
            raise InternalError(f"the manifest {digest} is not JSON") from error
        if not isinstance(manifest, dict):
            raise InternalError(f"the manifest {digest} is no JSON object")
        children = manifest.get("manifests")
        default = INDEX_TYPES[0] if children is not None else ""
        media_type = str(
            manifest.get("mediaType") or default or "application/vnd.oci.image.manifest.v1+json"
        )
        self._media_types[digest] = media_type
        self._sizes[digest] = len(body)
        try:
            blobs = [blob for blob in (manifest.get("config"), *manifest.get("layers", ())) if blob]
            below = {str(blob["digest"]): int(blob["size"]) for blob in blobs}
            self._sizes |= below
            images = [str(child["digest"]) for child in children or ()]
        except (KeyError, TypeError, ValueError) as error:
            raise InternalError(f"the manifest {digest} names content in a wrong way") from error
        self._below[digest], self._children[digest] = list(below.items()), images
        for image in images:
            if image not in self._media_types:
                await self.admit(image)
        return media_type

    def children(self, digest: str) -> list[str]:
        """Return the manifests below an admitted one, each behind those that it names."""
        found: dict[str, None] = {}
        for child in self._children.get(digest, ()):
            found |= dict.fromkeys((*self.children(child), child))
        return list(found)

    def below(self, digest: str) -> list[tuple[str, int]]:
        """Return the blobs of an admitted image with their bytes, those of its children as well."""
        names = (*self.children(digest), digest)
        return [blob for name in names for blob in self._below.get(name, ())]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of everything that belongs to the image, by digest."""
        return dict(self._sizes)

    @property
    def store(self) -> ProjectStore:
        """Where its content is."""
        return self._store

    def size(self, digest: str) -> int:
        """Return the size of a blob or manifest of the image.

        Raises:
            NotFoundError: it does not belong to the image.
        """
        size = self._sizes.get(digest)
        if size is None:
            raise NotFoundError(f"{digest} is not part of the image that this build made")
        return size

    def media_type(self, digest: str) -> str:
        """Return the media type of a manifest; empty for a blob."""
        return self._media_types.get(digest, "")

    async def path(self, digest: str) -> Path:
        """Return a verified file with the content.

        Raises:
            NotFoundError: it does not belong to the image, or is nowhere any more.
        """
        self.size(digest)
        return await self._store.open_blob(digest)

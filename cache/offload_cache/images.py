"""The documents that keep images in the shared store: each names all blobs of one image."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from offload_cache.collection.documents import read_document
from offload_core.digest import check_digest
from offload_core.errors import UsageError

MAX_IMAGE_BYTES = 8 << 20
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageDocument:
    """One image, or one index of images with all that is below it.

    Attributes:
        digest: of its manifest.
        build_id: that pushed it last.
        blobs: digests and sizes in bytes of its manifest and of everything that this names.
    """

    digest: str
    build_id: str
    blobs: tuple[tuple[str, int], ...]

    def to_bytes(self) -> bytes:
        """Return the document for the shared store."""
        return orjson.dumps(
            {
                "version": _VERSION,
                "digest": self.digest,
                "build_id": self.build_id,
                "blobs": self.blobs,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageDocument:
        """Read a document of the shared store.

        Raises:
            UnknownDocumentError: a later release wrote it.
            UsageError: it is damaged.
        """
        raw = read_document(data, "document of an image")
        try:
            return cls(
                check_digest(raw["digest"]),
                str(raw["build_id"]),
                tuple((check_digest(digest), int(size)) for digest, size in raw["blobs"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError("the document of an image is damaged") from error

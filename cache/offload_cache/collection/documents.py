"""The small documents of collection: leases and lists of what is about to be deleted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from offload_cache.keys import check_contribution_id
from offload_core.digest import check_digest
from offload_core.errors import UsageError

MAX_DOCUMENT_BYTES = 16 << 20
MAX_CONDEMNED = 20_000
"""Of blobs in one list; more are deleted with the next list."""
_VERSION = 1


class UnknownDocumentError(Exception):
    """A later release wrote this document: what it protects is not known, so nothing may go."""


@dataclass(frozen=True, slots=True)
class LeaseDocument:
    """What somebody relies upon for a while.

    Attributes:
        holder: for people: which node, for what.
        seconds: how long the lease counts from when the store took it.
        digests: of blobs.
        contributions: scope and name of contributions, whose blobs are meant.
    """

    holder: str
    seconds: float
    digests: frozenset[str] = field(default=frozenset())
    contributions: frozenset[tuple[str, str]] = field(default=frozenset())

    def to_bytes(self) -> bytes:
        """Return the document for the shared store."""
        return orjson.dumps(
            {
                "version": _VERSION,
                "holder": self.holder,
                "seconds": self.seconds,
                "digests": sorted(self.digests),
                "contributions": sorted(self.contributions),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> LeaseDocument:
        """Read a document of the shared store.

        Raises:
            UnknownDocumentError: a later release wrote it.
            UsageError: it is damaged.
        """
        raw = read_document(data, "lease")
        try:
            return cls(
                str(raw["holder"]),
                float(raw["seconds"]),
                frozenset(check_digest(digest) for digest in raw["digests"]),
                frozenset(
                    (str(scope), check_contribution_id(i)) for scope, i in raw["contributions"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError("a lease is damaged") from error


@dataclass(frozen=True, slots=True)
class CondemnedDocument:
    """What a collection is about to delete.

    Attributes:
        holder: for people: which node collects.
        seconds: how long the list counts from when the store took it.
        blobs: digests.
        images: digests of the manifests of images whose documents go.
    """

    holder: str
    seconds: float
    blobs: frozenset[str]
    images: frozenset[str] = field(default=frozenset())

    def to_bytes(self) -> bytes:
        """Return the document for the shared store."""
        return orjson.dumps(
            {
                "version": _VERSION,
                "holder": self.holder,
                "seconds": self.seconds,
                "blobs": sorted(self.blobs),
                "images": sorted(self.images),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> CondemnedDocument:
        """Read a document of the shared store.

        Raises:
            UnknownDocumentError: a later release wrote it.
            UsageError: it is damaged.
        """
        raw = read_document(data, "list of condemned blobs")
        try:
            return cls(
                str(raw["holder"]),
                float(raw["seconds"]),
                frozenset(check_digest(digest) for digest in raw["blobs"]),
                frozenset(check_digest(digest) for digest in raw["images"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError("a list of condemned blobs is damaged") from error


def read_document(data: bytes, what: str) -> dict[str, Any]:
    """Return a JSON document of the one version that is known.

    Raises:
        UnknownDocumentError: it has another version.
        UsageError: it is damaged.
    """
    try:
        raw = orjson.loads(data)
        version = raw["version"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"a {what} is damaged") from error
    if version != _VERSION:
        raise UnknownDocumentError(f"a {what} has the unknown version {version!r}")
    return dict(raw)

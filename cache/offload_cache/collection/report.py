"""What a collection did, as it is kept in the shared store for the whole pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

import orjson

from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from offload_cache.objectstore import ObjectStore

REPORT_KEY = "pool/collected.json"
_MAX_BYTES = 16 << 20


@dataclass(slots=True)
class ProjectReport:
    """One project after a collection.

    Attributes:
        live_bytes: of blobs that something needs.
        garbage_bytes: of blobs that nothing needs, but whose grace is not over.
        removed_entries: contributions and images that were removed.
        deleted_blobs: how many went.
        deleted_bytes: of these blobs.
        deleted_packs: packs of build contexts that went.
        problem: why less was done than usual; empty when all was done.
    """

    live_bytes: int = 0
    garbage_bytes: int = 0
    removed_entries: int = 0
    deleted_blobs: int = 0
    deleted_bytes: int = 0
    deleted_packs: int = 0
    problem: str = ""


@dataclass(slots=True)
class CollectionReport:
    """One collection of all projects.

    Attributes:
        at: when it ended, by the store's clock.
        by: the node.
        seconds: that it took.
        projects: by project.
        complete: whether it came to all projects.
    """

    at: datetime
    by: str
    seconds: float = 0.0
    projects: dict[str, ProjectReport] = field(default_factory=dict)
    complete: bool = True

    def to_bytes(self) -> bytes:
        """Return the document for the shared store."""
        return orjson.dumps({"version": 1, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> CollectionReport:
        """Read a document of the shared store.

        Raises:
            UsageError: it is damaged.
        """
        try:
            raw = orjson.loads(data)
            return cls(
                at=datetime.fromisoformat(raw["at"]),
                by=str(raw["by"]),
                seconds=float(raw["seconds"]),
                projects={
                    str(name): ProjectReport(**found) for name, found in raw["projects"].items()
                },
                complete=bool(raw["complete"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError("the report of the last collection is damaged") from error


async def read_report(objects: ObjectStore) -> CollectionReport | None:
    """Return what the last collection of the pool did; None when there was none.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    try:
        return CollectionReport.from_bytes(
            await objects.read_bytes(REPORT_KEY, max_bytes=_MAX_BYTES)
        )
    except (NotFoundError, UsageError):
        return None

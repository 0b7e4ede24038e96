"""What is kept of a build so that a later one can be compared with it.

A trace names pages of listings by digest: they are content of the project like any other. Values
of build arguments may be secret; of them only a keyed digest is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import orjson
import zstandard

from offload_core.errors import UsageError

MAX_TRACE_BYTES = 8 << 20
MAX_STEPS = 2_000
_VERSION = 1


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One instruction of a Dockerfile, as BuildKit told of it.

    Attributes:
        name: for example "[build 2/5] RUN make".
        digest: of the vertex; tells the steps of this build apart, and means nothing in another.
        inputs: vertices that it depends on.
        cached: it came from a cache.
        ended: it ran to its end, well or not.
        seconds: that it took; 0 when it was cached.
    """

    name: str
    digest: str
    inputs: tuple[str, ...]
    cached: bool
    ended: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class TracedSource:
    """One listing of a local source; `pages` are hexadecimal SHA-256 digests in order."""

    name: str
    pages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BuildTrace:
    """One build.

    Attributes:
        build_id: the build.
        key: tells builds of one project apart: definition, target, platforms.
        member: who ran it.
        node_id: where it ran.
        created_at: when it began, in UTC.
        ended_at: when its steps had ended, in UTC.
        dockerfile: text; empty when the node does not have it.
        arguments: keyed digest of the value by name of the build argument.
        read_scopes: that it was allowed to read.
        write_scope: that it wrote; empty for none.
        no_cache: the user wanted no cache.
        contributions: what it was offered, by name.
        withheld: layers of the offer that were not to be had.
        faults: attempts that failed on cached content.
        steps: in the order in which they began.
        sources: that BuildKit read.
    """

    build_id: str
    key: str
    member: str
    node_id: str
    created_at: datetime
    ended_at: datetime
    dockerfile: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    read_scopes: tuple[str, ...] = ()
    write_scope: str = ""
    no_cache: bool = False
    contributions: tuple[str, ...] = ()
    withheld: int = 0
    faults: int = 0
    steps: tuple[TracedStep, ...] = ()
    sources: tuple[TracedSource, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the document for the disk and the shared store: JSON in one zstd frame."""
        document = asdict(replace(self, steps=self.steps[:MAX_STEPS])) | {
            "version": _VERSION,
            "created_at": self.created_at.astimezone(UTC).isoformat(),
            "ended_at": self.ended_at.astimezone(UTC).isoformat(),
        }
        return zstandard.ZstdCompressor(level=3).compress(orjson.dumps(document))

    @classmethod
    def from_bytes(cls, data: bytes) -> BuildTrace:
        """Read a document.

        Raises:
            UsageError: it is damaged, too large or of an unknown version.
        """
        try:
            if not 0 < zstandard.frame_content_size(data) <= MAX_TRACE_BYTES:
                raise UsageError("the trace of a build is too large")
            raw: dict[str, Any] = orjson.loads(zstandard.ZstdDecompressor().decompress(data))
            if raw.pop("version") != _VERSION:
                raise UsageError("the trace of a build is of an unknown version")
            raw |= {
                "created_at": datetime.fromisoformat(raw["created_at"]),
                "ended_at": datetime.fromisoformat(raw["ended_at"]),
                "read_scopes": tuple(raw["read_scopes"]),
                "contributions": tuple(raw["contributions"]),
                "steps": tuple(
                    TracedStep(**step | {"inputs": tuple(step["inputs"])}) for step in raw["steps"]
                ),
                "sources": tuple(
                    TracedSource(source["name"], tuple(source["pages"]))
                    for source in raw["sources"]
                ),
            }
            return cls(**raw)
        except (KeyError, TypeError, ValueError, AttributeError, zstandard.ZstdError) as error:
            raise UsageError("the trace of a build is damaged") from error

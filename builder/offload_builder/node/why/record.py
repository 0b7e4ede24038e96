"""Puts together the trace of one build while it runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_builder.node.why.recorder import StepRecorder
from offload_builder.node.why.trace import BuildTrace, TracedSource
from offload_core.contextnames import DOCKERFILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from offload_builder.node.why.tracestore import TraceStore
    from offload_cache.offers import Offer
    from offload_proto.v1.builds_service_pb2 import Ticket
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Start

MAX_DOCKERFILE_BYTES = 256 << 10


class BuildRecord:
    """What `offload cache why` will want to know of a build.

    Attributes:
        faults: attempts that failed on cached content.
        key: tells builds of one project apart; empty until it is known.
    """

    def __init__(self, ticket: Ticket, start: Start) -> None:
        self.faults = 0
        self.key = ""
        self._ticket = ticket
        self._spec = start.spec
        self._dockerfile = next(
            (
                file.data[:MAX_DOCKERFILE_BYTES].decode("utf-8", "replace")
                for file in start.inline_files
                if file.local_name == DOCKERFILE and file.path == start.spec.dockerfile_path
            ),
            "",
        )
        self._created_at = datetime.now(UTC)
        self._steps = StepRecorder()
        self._contributions: tuple[str, ...] = ()
        self._withheld = 0
        self._sources: tuple[TracedSource, ...] = ()

    def add(self, batch: ProgressBatch) -> None:
        """Take news of the steps."""
        self._steps.add(batch)

    def offered(self, offer: Offer | None) -> None:
        """Note what the cache had for this build."""
        if offer is not None:
            self._contributions, self._withheld = offer.contributions, offer.withheld

    def read(self, listings: Iterable[tuple[str, Iterable[bytes]]]) -> None:
        """Note the listings that BuildKit was told, by local source, with digests of pages."""
        self._sources = tuple(
            TracedSource(name, tuple(page.hex() for page in pages)) for name, pages in listings
        )

    async def save(self, store: TraceStore) -> None:
        """Keep the trace of a build whose steps have ended, if it had any."""
        if not (steps := self._steps.steps()):
            return
        ticket, spec = self._ticket, self._spec
        arguments: Mapping[str, str] = dict(spec.build_args)
        await store.save(
            BuildTrace(
                build_id=ticket.build_id,
                key=self.key,
                member=ticket.member,
                node_id=ticket.node_id,
                created_at=self._created_at,
                ended_at=datetime.now(UTC),
                dockerfile=self._dockerfile,
                arguments=await store.argument_digests(arguments),
                read_scopes=tuple(ticket.read_scopes),
                write_scope=ticket.write_scope,
                no_cache=spec.no_cache,
                contributions=self._contributions,
                withheld=self._withheld,
                faults=self.faults,
                steps=steps,
                sources=self._sources,
            )
        )

"""What BuildKit tells of one build, on its way into the journal."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from offload_builder.node.pacing import BREATH_SECONDS, Pacer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.journal import Journal
    from offload_proto.v1.events_pb2 import ProgressBatch

    Take = Callable[[ProgressBatch], None]

STATUS_SECONDS = 5.0
"""BuildKit ends the progress stream with the build; this bounds the silence of one that does not
end."""


class TellsProgress(Protocol):
    """A BuildKit, as far as progress goes."""

    def status(self, ref: str) -> AsyncGenerator[ProgressBatch]:
        """Follow a build until it is over."""
        ...


class BuildProgress:
    """Reads the progress of the solves of one build.

    Args:
        journal: takes it.
        link: to the user, who is told of gaps.
        before: what looks at each batch, or changes it, before names are made readable.
        clean: makes a text readable.
        after: what looks at each batch afterwards.

    Attributes:
        warnings: how many there were so far.
        secret: what no output may tell; BuildKit writes the addresses of what it tries once more
            into the output of steps.
    """

    def __init__(
        self,
        journal: Journal,
        link: ClientLink,
        before: Sequence[Take],
        clean: Callable[[str], str],
        after: Sequence[Take],
    ) -> None:
        self._journal = journal
        self._link = link
        self._before = before
        self._clean = clean
        self._after = after
        self.warnings = 0
        self.secret = ""
        self._batches = 0
        self._told_gaps = False
        self._pacer: Pacer | None = None

    @asynccontextmanager
    async def following(self, client: TellsProgress, ref: str) -> AsyncIterator[None]:
        """Follow a solve that runs in the block; at its end, read the progress to its end, too."""
        status = asyncio.ensure_future(self._follow(client, ref))
        try:
            yield
            # A build that has printed much may have ended before all was read.
            taken = -1
            while not status.done() and taken != self._batches:
                taken = self._batches
                await asyncio.wait((status,), timeout=STATUS_SECONDS)
        finally:
            if status.done() and not status.cancelled():
                # The solve has said what is wrong; the progress stream would only repeat it.
                status.exception()
            status.cancel()

    async def _follow(self, client: TellsProgress, ref: str) -> None:
        pacer = self._pacer = Pacer(self._write)
        try:
            async with aclosing(client.status(ref)) as batches:
                async for batch in batches:
                    self._batches += 1
                    self.warnings += len(batch.warnings)
                    for take in self._before:
                        take(batch)
                    self._clean_batch(batch)
                    for take in self._after:
                        take(batch)
                    pacer.add(batch)
                    await self._tell_gaps()
                    if pacer.dense:
                        await asyncio.sleep(BREATH_SECONDS)
        finally:
            pacer.flush()
        await self._tell_gaps()

    def say(self, batch: ProgressBatch) -> None:
        """Add news of our own, in their order; the batch is ours from now on."""
        if self._pacer is not None:
            self._pacer.add(batch)
            self._pacer.flush()
        else:
            self._write(batch)

    def _write(self, batch: ProgressBatch) -> None:
        self._journal.append(batch, self.secret.encode(), self._hide)

    def _hide(self, batch: ProgressBatch) -> None:
        for log in batch.logs:
            log.data = self._cleaned(log.data)
        for warning in batch.warnings:
            warning.short = self._cleaned(warning.short)
            warning.detail[:] = map(self._cleaned, warning.detail)
        for use in batch.egress:
            use.url, use.reason = self._clean(use.url), self._clean(use.reason)

    def _cleaned(self, data: bytes) -> bytes:
        return self._clean(data.decode("utf-8", "surrogateescape")).encode(
            "utf-8", "surrogateescape"
        )

    async def _tell_gaps(self) -> None:
        if self._journal.lost_batches and not self._told_gaps:
            self._told_gaps = True
            await self._link.notice("the disk of the node is full: the output shown here has gaps")

    def _clean_batch(self, batch: ProgressBatch) -> None:
        for vertex in batch.vertices:
            vertex.name = self._clean(vertex.name)
            vertex.error = self._clean(vertex.error)
        for status in batch.statuses:
            status.id = self._clean(status.id)
            status.name = self._clean(status.name)

"""The blobs that one build needs: found, fetched from the shared store, or asked of the client."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.blobplaces import is_of_entry, is_piece, requests
from offload_builder.node.contextstore import ANY_SIZE
from offload_builder.node.recentblobs import RecentBlobs
from offload_core.aio import TaskSet
from offload_core.errors import ContextChangedError, InternalError, NodeLostError, OffloadError
from offload_proto.v1.node_service_pb2 import RunResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_builder.node.arrivals import Arrivals
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.contextshare import SharedContext
    from offload_builder.node.contextstore import ContextStore
    from offload_proto.v1.builds_service_pb2 import BuildStats
    from offload_proto.v1.node_service_pb2 import BlobFailure

log = structlog.get_logger(__name__)

MAX_FAILURES = 16
"""A client that cannot deliver more files than that is taken to deliver none."""
MAX_SENTENCE = 1000
PATIENCE_SECONDS = 5.0
"""How long another build may take before what it has not brought is asked of this one's client."""
LONG_SECONDS = 20.0
"""Longer than this nobody waits for another build that is slow."""
_ASKED = 1
_VERIFIED = 2


class WantedBlobs:
    """What one build has asked for, by digest; each blob is leased from then on until `close`.

    A blob is *pending* from `want` until it is stored or has failed. It is then brought by this
    build, from the shared store or its client, or by another build that claimed it first.
    """

    def __init__(
        self,
        store: ContextStore,
        arrivals: Arrivals,
        link: ClientLink,
        shared: SharedContext | None,
        stats: BuildStats,
    ) -> None:
        self.store = store
        self.shared = shared
        self.stats = stats
        self.recent = RecentBlobs()
        self.eased = asyncio.Event()
        """Set whenever fewer pieces are pending."""
        self.pending_pieces = 0
        self._arrivals = arrivals
        self._link = link
        self._held: dict[bytes, int] = {}
        self._pending: dict[bytes, int] = {}
        """By digest, the place of the blob in the client's listing."""
        self._failed: dict[bytes, OffloadError | None] = {}
        """Why it will not come; None: what came was wrong."""
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._fault: OffloadError | None = None
        self._failures = 0
        self._impatient = False
        """A task sees to it that other builds bring what they claimed."""
        self._closed = False
        self._tasks = TaskSet(self._task_failed)

    # What readers use.

    async def want(self, places: Mapping[bytes, int], sizes: Mapping[bytes, int]) -> None:
        """Make sure that blobs are here or on their way.

        Args:
            places: of the blobs in the client's listing, by digest.
            sizes: their bytes, where they are known.
        """
        new = [digest for digest in places if digest not in self._held]
        if not new or self._closed:
            return
        self.store.lease(new)
        self._held.update(dict.fromkeys(new, 0))
        await self._begin(new, places, sizes)

    async def want_again(self, digest: bytes, place: int, size: int) -> None:
        """Make sure that a blob comes once more: what was stored is damaged or gone."""
        if digest not in self._pending and not self._closed:
            self._held[digest] &= ~_VERIFIED
            await self._begin([digest], {digest: place}, {digest: size})

    async def _begin(
        self, digests: list[bytes], places: Mapping[bytes, int], sizes: Mapping[bytes, int]
    ) -> None:
        mine = []
        for digest in digests:
            self._pending[digest] = places[digest]
            self.pending_pieces += is_piece(places[digest])
            # Claimed before it is looked for: what another build stores meanwhile is not missed.
            if self._arrivals.claim(self, digest):
                mine.append(digest)
        if len(mine) < len(digests) and not self._impatient:
            self._impatient = True
            self._tasks.start(self._watch_others(), name="context-patience")
        if mine:
            # In a task, because a claim must be followed up also when the caller is cancelled.
            look = self._tasks.start(
                self._look(mine, [sizes.get(digest, ANY_SIZE) for digest in mine]),
                name="context-look",
            )
            await asyncio.wait((look,))

    def is_verified(self, digest: bytes) -> bool:
        """Return whether the stored bytes were hashed in the time of this build."""
        return bool(self._held.get(digest, 0) & _VERIFIED)

    def note_verified(self, digest: bytes) -> None:
        """Note that the stored bytes were hashed."""
        if digest in self._held:
            self._held[digest] |= _VERIFIED

    def is_pending(self, digest: bytes) -> bool:
        """Return whether `arrival` would wait."""
        return digest in self._pending

    def is_settled(self, digest: bytes) -> bool:
        """Return whether a blob was stored: it is not on its way, and has not failed."""
        return digest not in self._pending and digest not in self._failed

    async def arrival(self, digest: bytes, path: str) -> None:
        """Wait until a blob is stored; returns at once when it is not on its way.

        Args:
            digest: of the blob.
            path: of its file, for the error.

        Raises:
            ContextChangedError: the client cannot deliver it.
            OffloadError: it will not come for another reason.
        """
        while digest in self._pending:
            future = self._waiting.get(digest)
            if future is None:
                future = asyncio.get_running_loop().create_future()
                self._waiting[digest] = future
            # Several readers may wait for one blob; cancelling one must not cancel the others.
            if self._held[digest] & _ASKED:
                with self._link.expect(self.fail):
                    await asyncio.shield(future)
            else:
                await asyncio.shield(future)
        if digest in self._failed:
            raise self._failed[digest] or changed(path)

    # Bringing them.

    async def _look(self, digests: list[bytes], sizes: list[int]) -> None:
        missing = await self.store.run(self.store.missing_sync, digests, sizes)
        absent = set(missing)
        self._arrivals.arrived(
            (digest for digest in digests if digest not in absent), verified=False
        )
        if not missing:
            return
        shared = self.shared
        found = await shared.find(missing) if shared is not None else set()
        if shared is not None and found:
            absent -= found
            here = [digest for digest in missing if digest in found]
            self._tasks.start(self._fetch(shared, here), name="context-fetch")
        await self._ask([digest for digest in missing if digest in absent])

    async def _fetch(self, shared: SharedContext, digests: list[bytes]) -> None:
        """Fetch blobs from the shared store; what does not come is asked of the client."""
        async with aclosing(shared.fetch(digests)) as groups:
            async for group in groups:
                await self.store.run(self.store.put_many_sync, group)
                self.stats.context_shared_bytes += sum(len(data) for _, data in group)
                self.recent.add(group)
                self._arrivals.arrived((digest for digest, _ in group), verified=True)
        await self._ask(digests)

    async def _ask(self, digests: Iterable[bytes]) -> None:
        wanted = [digest for digest in digests if digest in self._pending]
        error = self._fault or self._link.error
        if error is not None:
            self._give_up(wanted, error)
            return
        for digest in wanted:
            self._held[digest] |= _ASKED
            if (reader := self._waiting.pop(digest, None)) is not None:
                # It waits on, but from now on for the client.
                reader.set_result(None)
        for message in requests([self._pending[digest] for digest in wanted]):
            await self._link.outbox.put(RunResponse(need_blobs=message))

    def repeated(self) -> list[RunResponse]:
        """Return what a client that comes back is asked for again."""
        asked = [place for digest, place in self._pending.items() if self._held[digest] & _ASKED]
        return [RunResponse(need_blobs=message) for message in requests(sorted(asked))]

    def _task_failed(self, name: str, error: BaseException) -> None:
        if isinstance(error, OffloadError):
            self.fail(error)
        else:
            log.error("context.transfer.failed", task=name, exc_info=error)
            self.fail(InternalError("the node could not get the build context; its log says more"))

    async def _watch_others(self) -> None:
        """Bring what another build does not: its client may be slow, or silent for ever.

        The others are left what they bring meanwhile, as they go on from the beginning.
        """
        try:
            while waited := [digest for digest in self._pending if self._waits_for_others(digest)]:
                await asyncio.sleep(PATIENCE_SECONDS)
                late = [digest for digest in waited if digest in self._pending]
                brought = len(waited) - len(late)
                if brought and len(late) / brought * PATIENCE_SECONDS < LONG_SECONDS:
                    continue
                taken = self._arrivals.take(self, late[brought:])
                await self._look(taken, [ANY_SIZE] * len(taken))
        finally:
            self._impatient = False

    def _waits_for_others(self, digest: bytes) -> bool:
        return not self._held[digest] & _ASKED and not self._arrivals.brings(self, digest)

    # What Arrivals tells.

    def arrived(self, digests: list[bytes], *, verified: bool) -> None:
        """Hear that blobs are stored now."""
        for digest in digests:
            if self._resolve(digest) and verified:
                self._held[digest] |= _VERIFIED

    def take_over(self, digests: list[bytes]) -> None:
        """Hear that this build has to bring blobs for which it waited."""
        self._tasks.start(self._look(digests, [ANY_SIZE] * len(digests)), name="context-take-over")

    def _resolve(self, digest: bytes) -> bool:
        place = self._pending.pop(digest, None)
        if place is None:
            return False
        if is_piece(place):
            self.pending_pieces -= 1
            self.eased.set()
        if (reader := self._waiting.pop(digest, None)) is not None and not reader.done():
            reader.set_result(None)
        return True

    # What uploads tell.

    def heard(self) -> None:
        """Note a sign of life of the client."""
        self._link.heard()

    @property
    def closed(self) -> bool:
        """Whether the build needs nothing any more."""
        return self._closed

    def asked(self, digest: bytes) -> bool:
        """Return whether the client was asked for a blob."""
        return bool(self._held.get(digest, 0) & _ASKED)

    def stored(self, blobs: Sequence[tuple[bytes, memoryview]], *, size: int) -> None:
        """Hear that blobs of the client were verified and stored.

        Args:
            blobs: digest and content.
            size: of the blobs in bytes.
        """
        if self._closed:
            return
        digests = [digest for digest, _ in blobs]
        self.stats.context_sent_bytes += size
        self.recent.add([item for item in blobs if item[0] in self._pending])
        self._arrivals.arrived(digests, verified=True)
        if self.shared is not None:
            self.shared.added(digests)

    def refused(self, digest: bytes) -> None:
        """Hear that what the client sent as a blob is something else."""
        self.stats.context_refused_blobs += 1
        log.warning("context.blob.refused", sha256=digest.hex(), reason="digest mismatch")
        self._give_up([digest], None)

    def blob_failure(self, message: BlobFailure) -> None:
        """Hear that the client cannot deliver a file."""
        error = ContextChangedError(message.message[:MAX_SENTENCE])
        self._failures += 1
        if self._failures > MAX_FAILURES:
            self.fail(error)
            return
        failed = [
            digest
            for digest, place in self._pending.items()
            if is_of_entry(place, message.request_id, message.entry)
        ]
        self._give_up(failed, error)

    # Endings.

    def fail(self, error: OffloadError) -> None:
        """End everything that is pending, and what would be asked for later; the first holds."""
        self._fault = self._fault or error
        self._give_up(list(self._pending), self._fault)

    def _give_up(self, digests: Sequence[bytes], error: OffloadError | None) -> None:
        pending = [digest for digest in digests if digest in self._pending]
        for digest in pending:
            self._failed[digest] = error
            self._resolve(digest)
        self._arrivals.give_up(self, pending)

    async def close(self) -> None:
        """Give claims and leases back; safe to call again."""
        self._closed = True
        self.fail(NodeLostError("the build is over"))
        try:
            await self._tasks.close()
        finally:
            held, self._held = self._held, {}
            self.store.release(held)
            self._failed.clear()
            self.recent.clear()
        if self.store.was_full:
            await self.store.run(self.store.make_room_sync)


def changed(path: str) -> ContextChangedError:
    """Return the error for a file whose bytes are not those that were listed."""
    return ContextChangedError(
        f'"{path}" of the build context changed during the build: '
        "what was sent is not what was listed; build again"
    )

"""The conversation with the client of one build: requests out, answers in, blobs awaited."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from offload_builder.node.entries import check_entry
from offload_builder.node.outbox import Outbox
from offload_core.errors import ContextChangedError, ContextError, OffloadError, UsageError
from offload_proto.v1.node_service_pb2 import (
    ContextEntries,
    ContextRequest,
    CredentialsRequest,
    NeedBlobs,
    Notice,
    RunResponse,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_proto.v1.node_service_pb2 import (
        BlobFailure,
        ContextEntry,
        ContextFailure,
        CredentialsReply,
    )

CREDENTIALS_SECONDS = 60.0
"""Longer than any credential helper needs; BuildKit's own session auth gives up after 60 s."""
MAX_ENTRIES = 2_000_000
MAX_LISTING_BYTES = 512 << 20
"""Size of all entries of one listing on the wire; 2,000,000 entries of 250 bytes."""
BLOBS_PER_MESSAGE = 10_000
SILENCE_SECONDS = 1800.0
"""A client that has to answer and says nothing for so long is given up. Listing and hashing a
large context takes minutes, in which it says nothing; a client that died is noticed in 30 s by
the keepalive of its connection."""
_WATCH_SECONDS = 30.0


class ClientLink:
    """What the node asks of the client while a build runs.

    `outbox` is drained by the gRPC handler. `lose` ends everything that waits and must be called
    at the end in any case.
    """

    def __init__(self, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.outbox = Outbox()
        self._silence_seconds = silence_seconds
        self._heard_at = 0.0
        self._watching: asyncio.TimerHandle | None = None
        self._next_id = 0
        self._contexts: dict[int, _Listing] = {}
        self._credentials: dict[int, asyncio.Future[tuple[str, str]]] = {}
        self._arrivals: dict[bytes, asyncio.Future[None]] = {}
        self._sizes: dict[bytes, int] = {}
        self._lost: OffloadError | None = None

    @property
    def lost(self) -> bool:
        """Whether the client can no longer be asked."""
        return self._lost is not None

    def heard(self) -> None:
        """Note a sign of life of the client."""
        self._heard_at = asyncio.get_running_loop().time()

    # Requests.

    async def request_context(
        self, name: str, include: Sequence[str], exclude: Sequence[str], follow: Sequence[str]
    ) -> list[ContextEntry]:
        """Return the entries of a local source.

        Raises:
            ContextError: the client cannot read it, or does not answer.
        """
        request_id = self._new_id()
        listing = self._contexts[request_id] = _Listing(self._future())
        self._watch()
        try:
            await self.outbox.put(
                RunResponse(
                    context_request=ContextRequest(
                        request_id=request_id,
                        local_name=name,
                        include_patterns=include,
                        exclude_patterns=exclude,
                        follow_paths=follow,
                    )
                )
            )
            await listing.done
        finally:
            del self._contexts[request_id]
        return listing.entries

    async def request_blobs(self, sizes: Mapping[bytes, int]) -> None:
        """Ask for blobs that nobody has asked for yet; `arrival` tells when one is there.

        Args:
            sizes: the bytes of each blob, by its digest.

        Raises:
            OffloadError: the client is gone.
        """
        wanted = [digest for digest in sizes if digest not in self._arrivals]
        if wanted and self._lost is not None:
            raise self._lost
        for digest in wanted:
            self._arrivals[digest] = self._future()
            self._sizes[digest] = sizes[digest]
        self._watch()
        for start in range(0, len(wanted), BLOBS_PER_MESSAGE):
            await self.outbox.put(
                RunResponse(need_blobs=NeedBlobs(sha256=wanted[start : start + BLOBS_PER_MESSAGE]))
            )

    async def arrival(self, digest: bytes) -> None:
        """Wait until a blob that was asked for is stored; returns at once for any other.

        Raises:
            ContextChangedError: the client cannot deliver it.
        """
        future = self._arrivals.get(digest)
        if future is not None:
            # Several readers may wait for one blob; cancelling one must not cancel the others.
            await asyncio.shield(future)

    def wanted(self, digest: bytes) -> bool:
        """Return whether a blob was asked for and is not yet there."""
        future = self._arrivals.get(digest)
        return future is not None and not future.done()

    def size(self, digest: bytes) -> int:
        """Return the bytes of a blob that was asked for, as the client has listed it."""
        return self._sizes.get(digest, 0)

    async def request_credentials(self, host: str) -> tuple[str, str]:
        """Return user and secret for a registry; two empty strings when the client has none."""
        request_id = self._new_id()
        reply: asyncio.Future[tuple[str, str]] = self._future_of_credentials()
        self._credentials[request_id] = reply
        try:
            await self.outbox.put(
                RunResponse(
                    credentials_request=CredentialsRequest(request_id=request_id, host=host)
                )
            )
            async with asyncio.timeout(CREDENTIALS_SECONDS):
                return await reply
        except TimeoutError:
            return "", ""
        finally:
            del self._credentials[request_id]

    async def notice(self, text: str, *, level: str = "warning") -> None:
        """Tell the user a sentence outside the build's log."""
        await self.outbox.put(RunResponse(notice=Notice(level=level, text=text)))

    # Answers.

    def context_entries(self, message: ContextEntries) -> None:
        """Take entries from the client.

        Raises:
            UsageError: unasked, too many, or a path that leaves the context.
        """
        listing = self._contexts.get(message.request_id)
        if listing is None:
            if 0 < message.request_id <= self._next_id:
                return  # BuildKit has given up this request meanwhile.
            raise UsageError("the client sent a build context that was not asked for")
        if listing.done.done():
            raise UsageError("the client sent more of a build context that it had ended")
        for entry in message.entries:
            check_entry(entry)
        listing.entries.extend(message.entries)
        listing.bytes += message.ByteSize()
        if len(listing.entries) > MAX_ENTRIES or listing.bytes > MAX_LISTING_BYTES:
            raise UsageError(
                f"the build context is too large: at most {MAX_ENTRIES} files and directories "
                f"are taken; exclude what is not needed in .dockerignore"
            )
        if message.last:
            listing.done.set_result(None)

    def context_failure(self, message: ContextFailure) -> None:
        """Take the news that a local source cannot be read."""
        listing = self._contexts.get(message.request_id)
        if listing is not None and not listing.done.done():
            cls = ContextChangedError if message.changed else ContextError
            listing.done.set_exception(cls(message.message))

    def credentials_reply(self, message: CredentialsReply) -> None:
        """Take a login."""
        reply = self._credentials.get(message.request_id)
        if reply is not None and not reply.done():
            reply.set_result((message.username, message.secret))

    def blob_failure(self, message: BlobFailure) -> None:
        """Take the news that a blob cannot be delivered."""
        future = self._arrivals.get(message.sha256)
        if future is not None and not future.done():
            future.set_exception(ContextChangedError(message.message))

    def blobs_arrived(self, digests: Sequence[bytes]) -> None:
        """Say that blobs are stored now."""
        for digest in digests:
            future = self._arrivals.get(digest)
            if future is not None and not future.done():
                future.set_result(None)

    def fail_blobs(self, error: OffloadError) -> None:
        """Say that no blob that is still missing will come."""
        for future in self._arrivals.values():
            if not future.done():
                future.set_exception(error)

    def lose(self, error: OffloadError) -> None:
        """End everything that waits for the client, now and later; the first error holds."""
        self._lost = self._lost or error
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        self._fail_all(self._lost)

    def _fail_all(self, error: OffloadError) -> None:
        futures: list[asyncio.Future[Any]] = [
            *(listing.done for listing in self._contexts.values()),
            *self._credentials.values(),
            *self._arrivals.values(),
        ]
        for future in futures:
            if not future.done():
                future.set_exception(error)
                # Nobody may be waiting any more; an unseen exception would only make noise.
                future.exception()

    def _watch(self) -> None:
        """See to it that a client that must answer does so, sooner or later."""
        self.heard()
        if self._watching is None and self._lost is None:
            pause = min(_WATCH_SECONDS, self._silence_seconds)
            self._watching = asyncio.get_running_loop().call_later(pause, self._check_silence)

    def _check_silence(self) -> None:
        self._watching = None
        waiting = any(not listing.done.done() for listing in self._contexts.values()) or any(
            not future.done() for future in self._arrivals.values()
        )
        if not waiting:
            return
        silent = asyncio.get_running_loop().time() - self._heard_at
        if silent < self._silence_seconds:
            pause = min(_WATCH_SECONDS, self._silence_seconds)
            self._watching = asyncio.get_running_loop().call_later(pause, self._check_silence)
            return
        self._fail_all(
            ContextError(
                f"the client has not sent the build context that was asked for; "
                f"it was silent for {silent:.0f} seconds"
            )
        )

    def _new_id(self) -> int:
        if self._lost is not None:
            raise self._lost
        self._next_id += 1
        return self._next_id

    @staticmethod
    def _future() -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Marks the exception as seen: a blob may fail while nobody reads it yet.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    @staticmethod
    def _future_of_credentials() -> asyncio.Future[tuple[str, str]]:
        return asyncio.get_running_loop().create_future()


class _Listing:
    """The answer to one context request while it arrives."""

    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done
        self.entries: list[ContextEntry] = []
        self.bytes = 0

"""The conversation with the client of one build: requests out, answers in, blobs awaited."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Sequence

    from offload_proto.v1.node_service_pb2 import (
        BlobFailure,
        ContextEntry,
        ContextFailure,
        CredentialsReply,
    )

OUTBOX_MESSAGES = 64
CREDENTIALS_SECONDS = 60.0
"""Longer than any credential helper needs; BuildKit's own session auth gives up after 60 s."""
MAX_ENTRIES = 2_000_000


class ClientLink:
    """What the node asks of the client while a build runs.

    `outbox` is drained by the gRPC handler; it is bounded, so a client that does not read holds
    up its own build only.
    """

    def __init__(self) -> None:
        self.outbox: asyncio.Queue[RunResponse | None] = asyncio.Queue(OUTBOX_MESSAGES)
        self._next_id = 0
        self._contexts: dict[int, tuple[list[ContextEntry], asyncio.Future[None]]] = {}
        self._credentials: dict[int, asyncio.Future[tuple[str, str]]] = {}
        self._arrivals: dict[bytes, asyncio.Future[None]] = {}
        self._lost: OffloadError | None = None

    # Requests.

    async def request_context(
        self, name: str, include: Sequence[str], exclude: Sequence[str], follow: Sequence[str]
    ) -> list[ContextEntry]:
        """Return the entries of a local source.

        Raises:
            ContextError: the client cannot read it.
        """
        request_id = self._new_id()
        done = self._future()
        entries: list[ContextEntry] = []
        self._contexts[request_id] = (entries, done)
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
            await done
        finally:
            del self._contexts[request_id]
        return entries

    async def request_blobs(self, digests: Sequence[bytes]) -> None:
        """Ask for blobs that nobody has asked for yet; `arrival` tells when one is there."""
        wanted = [digest for digest in dict.fromkeys(digests) if digest not in self._arrivals]
        for digest in wanted:
            self._arrivals[digest] = self._future()
        for start in range(0, len(wanted), 10_000):
            await self.outbox.put(
                RunResponse(need_blobs=NeedBlobs(sha256=wanted[start : start + 10_000]))
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
        pending = self._contexts.get(message.request_id)
        if pending is None:
            raise UsageError("the client sent a build context that was not asked for")
        entries, done = pending
        for entry in message.entries:
            check_path(entry.path)
        entries.extend(message.entries)
        if len(entries) > MAX_ENTRIES:
            raise UsageError(f"the build context has more than {MAX_ENTRIES} files")
        if message.last and not done.done():
            done.set_result(None)

    def context_failure(self, message: ContextFailure) -> None:
        """Take the news that a local source cannot be read."""
        pending = self._contexts.get(message.request_id)
        if pending is not None and not pending[1].done():
            cls = ContextChangedError if message.changed else ContextError
            pending[1].set_exception(cls(message.message))

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
        """End everything that waits for the client."""
        self._lost = error
        futures: list[asyncio.Future[Any]] = [
            *(done for _, done in self._contexts.values()),
            *self._credentials.values(),
            *self._arrivals.values(),
        ]
        for future in futures:
            if not future.done():
                future.set_exception(error)
                # Nobody may be waiting any more; an unseen exception would only make noise.
                future.exception()

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


def check_path(path: str) -> None:
    """Refuse a path that is not relative, clean and below its root.

    Raises:
        UsageError: with the path.
    """
    if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"the client sent a build context with the bad path {path[:200]!r}")

"""The conversation with the client of one build: requests out, answers in."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_builder.node.listingfeed import ListingFeed
from offload_builder.node.outbox import Outbox
from offload_core.errors import ContextError, OffloadError, UsageError
from offload_proto.v1.node_service_pb2 import (
    ContextRequest,
    CredentialsRequest,
    Notice,
    RunResponse,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from offload_proto.v1.node_service_pb2 import (
        ContextFailure,
        ContextListing,
        ContextPage,
        CredentialsReply,
    )

CREDENTIALS_SECONDS = 60.0
"""Longer than any credential helper needs; BuildKit's own session auth gives up after 60 s."""
SILENCE_SECONDS = 1800.0
"""A client that has to answer and says nothing for so long is given up. Hashing a large file
takes minutes, in which it says nothing; a client that died is noticed in 30 s by the keepalive of
its connection."""
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
        self._next_waiter = 0
        self._waiters: dict[int, Callable[[OffloadError], None]] = {}
        self._listings: dict[int, ListingFeed] = {}
        self._credentials: dict[int, asyncio.Future[tuple[str, str]]] = {}
        self._error: OffloadError | None = None

    @property
    def lost(self) -> bool:
        """Whether the client can no longer be asked."""
        return self._error is not None

    @property
    def error(self) -> OffloadError | None:
        """Why the client can no longer be asked, or None."""
        return self._error

    def heard(self) -> None:
        """Note a sign of life of the client."""
        self._heard_at = asyncio.get_running_loop().time()

    @contextmanager
    def expect(self, fail: Callable[[OffloadError], None]) -> Iterator[None]:
        """Say, for as long as the block runs, that the client must send something.

        `fail(error)` is called when it is lost or silent meanwhile; it may be called twice.

        Raises:
            OffloadError: the client is gone already.
        """
        if self._error is not None:
            raise self._error
        self._next_waiter += 1
        number = self._next_waiter
        if not self._waiters:
            self.heard()
        self._waiters[number] = fail
        if self._watching is None:
            self._watch_later()
        try:
            yield
        finally:
            self._waiters.pop(number, None)

    # Requests.

    async def request_context(
        self, name: str, include: Sequence[str], exclude: Sequence[str], follow: Sequence[str]
    ) -> ListingFeed:
        """Ask for the entries of a local source; the caller closes what is returned.

        Raises:
            OffloadError: the client is gone.
        """
        request_id = self._new_id()
        feed = ListingFeed(request_id, self._send, self.expect)
        feed.on_close = lambda: self._listings.pop(request_id, None)
        self._listings[request_id] = feed
        try:
            await self._send(
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
        except BaseException:
            feed.close()
            raise
        return feed

    async def request_credentials(self, host: str) -> tuple[str, str]:
        """Return user and secret for a registry; two empty strings when the client has none.

        Raises:
            OffloadError: the client is gone.
        """
        request_id = self._new_id()
        reply: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._credentials[request_id] = reply
        try:
            await self._send(
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
        await self._send(RunResponse(notice=Notice(level=level, text=text)))

    # Answers.

    def context_listing(self, message: ContextListing) -> None:
        """Take names of pages.

        Raises:
            UsageError: unasked, too many, or malformed.
        """
        feed = self._listing(message.request_id)
        if feed is not None:
            feed.take_listing(message)

    def context_page(self, message: ContextPage) -> None:
        """Take a page, or its times.

        Raises:
            UsageError: unasked or too large.
        """
        feed = self._listing(message.request_id)
        if feed is not None:
            feed.take_page(message)

    def context_failure(self, message: ContextFailure) -> None:
        """Take the news that a local source cannot be read."""
        feed = self._listings.get(message.request_id)
        if feed is not None:
            feed.take_failure(message)

    def credentials_reply(self, message: CredentialsReply) -> None:
        """Take a login."""
        reply = self._credentials.get(message.request_id)
        if reply is not None and not reply.done():
            reply.set_result((message.username, message.secret))

    def lose(self, error: OffloadError) -> None:
        """End everything that waits for the client, now and later; the first error holds."""
        self._error = self._error or error
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        for feed in list(self._listings.values()):
            feed.fail(self._error)
        for reply in self._credentials.values():
            if not reply.done():
                reply.set_exception(self._error)
                # Nobody may be waiting any more; an unseen exception would only make noise.
                reply.exception()
        self._fail_waiters(self._error)

    def _fail_waiters(self, error: OffloadError) -> None:
        for fail in list(self._waiters.values()):
            fail(error)

    def _watch_later(self) -> None:
        pause = min(_WATCH_SECONDS, self._silence_seconds)
        self._watching = asyncio.get_running_loop().call_later(pause, self._check_silence)

    def _check_silence(self) -> None:
        """See to it that a client that must answer does so, sooner or later."""
        self._watching = None
        if not self._waiters:
            return
        silent = asyncio.get_running_loop().time() - self._heard_at
        if silent < self._silence_seconds:
            self._watch_later()
            return
        self._fail_waiters(
            ContextError(
                f"the client has not sent the build context that was asked for; "
                f"it was silent for {silent:.0f} seconds"
            )
        )

    def _listing(self, request_id: int) -> ListingFeed | None:
        feed = self._listings.get(request_id)
        # What BuildKit has given up meanwhile may still come.
        if feed is None and not 0 < request_id <= self._next_id:
            raise UsageError("the client sent a build context that was not asked for")
        return feed

    async def _send(self, message: RunResponse) -> None:
        await self.outbox.put(message)

    def _new_id(self) -> int:
        if self._error is not None:
            raise self._error
        self._next_id += 1
        return self._next_id

"""The conversation with the client of one build: requests out, answers in."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from offload_builder.node.listingfeed import ListingFeed
from offload_builder.node.outbox import Outbox
from offload_builder.node.sshagents import REPLY_SECONDS, SshStream
from offload_core.aio import finish
from offload_core.errors import ContextError, NodeLostError, OffloadError, UsageError
from offload_proto.v1.node_service_pb2 import (
    ContextRequest,
    CredentialsRequest,
    Notice,
    RunResponse,
    SecretRequest,
    SshData,
    SshOpen,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from offload_proto.v1.node_service_pb2 import (
        ContextFailure,
        ContextListing,
        ContextPage,
        CredentialsReply,
        SecretReply,
    )

CREDENTIALS_SECONDS = 60.0
"""Longer than any credential helper needs; BuildKit's own session auth gives up after 60 s."""
SECRET_SECONDS = 300.0
"""A secret may come out of a pipe whose other end asks a vault."""
CLOSE_SECONDS = 5.0
SILENCE_SECONDS = 1800.0
"""A client that has to answer and says nothing for so long is given up. Hashing a large file
takes minutes, in which it says nothing; a client that died is noticed in 30 s by the keepalive of
its connection."""
_WATCH_SECONDS = 30.0
ANSWERS = (
    "context_listing",
    "context_page",
    "context_failure",
    "credentials_reply",
    "secret_reply",
    "ssh_data",
)
"""What a client says to its `ClientLink`: fields of `RunRequest` and methods of that class."""


class ClientLink:
    """What the node asks of the client while a build runs.

    `outbox` is drained by the gRPC handler of the client that is there. A client may be followed by
    another, which is asked again what is open. `lose` ends everything that waits and must be called
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
        self._credentials: dict[int, tuple[str, str, asyncio.Future[tuple[str, str]]]] = {}
        self._secrets: dict[int, tuple[str, asyncio.Future[SecretReply]]] = {}
        self._ssh: dict[int, SshStream] = {}
        self._away = False
        self._turned = asyncio.Event()
        """Set unless the client is away and may come back."""
        self._turned.set()
        self._forgone = False
        self._error: OffloadError | None = None

    @property
    def lost(self) -> bool:
        """Whether the client can no longer be asked."""
        return self._error is not None

    @property
    def error(self) -> OffloadError | None:
        """Why the client can no longer be asked, or None."""
        return self._error

    def attach(self, outbox: Outbox) -> None:
        """Talk to another client from now on."""
        if outbox is not self.outbox:
            self._fail_ssh()
        self.outbox = outbox
        self._away = self._forgone = False
        self._turned.set()
        self.heard()

    def detach(self, outbox: Outbox) -> None:
        """Note that a client is gone; what is said meanwhile is lost, and can be `repeated`."""
        if self.outbox is outbox:
            self.outbox = Outbox()
            self.outbox.drop()
            self._away = True
            self._turned.clear()
            self._fail_ssh()

    def _fail_ssh(self) -> None:
        # Another client knows nothing of them.
        for stream in self._ssh.values():
            stream.fail(NodeLostError("the client with the SSH agent went away"))

    @property
    def away(self) -> bool:
        """Whether no client is there; one may come back."""
        return self._away and self._error is None

    def forgo(self) -> None:
        """Wait for no answer that the build can do without: a login that is not known is none."""
        self._forgone = True
        for _, _, reply in self._credentials.values():
            if not reply.done():
                reply.set_result(("", ""))

    def repeated(self, *, context: bool) -> list[RunResponse]:
        """Return the requests that are open, for a client that comes back.

        Args:
            context: local sources are not complete; the client lists them again, because a new
                process knows nothing of what a former one has listed.
        """
        found = [feed.repeat() for feed in self._listings.values()] if context else []
        messages = [request for request, _ in found]
        messages += [needed for _, needed in found if needed is not None]
        messages += [
            _credentials_request(request_id, host, repository)
            for request_id, (host, repository, reply) in self._credentials.items()
            if not reply.done()
        ]
        messages += [
            _secret_request(request_id, secret_id)
            for request_id, (secret_id, reply) in self._secrets.items()
            if not reply.done()
        ]
        return messages

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
        request = RunResponse(
            context_request=ContextRequest(
                request_id=request_id,
                local_name=name,
                include_patterns=include,
                exclude_patterns=exclude,
                follow_paths=follow,
            )
        )
        feed = ListingFeed(request_id, self._send, self.expect, request)
        feed.on_close = lambda: self._listings.pop(request_id, None)
        self._listings[request_id] = feed
        try:
            await self._send(request)
        except BaseException:
            feed.close()
            raise
        return feed

    async def request_credentials(self, host: str, repository: str = "") -> tuple[str, str]:
        """Return user and secret for a registry; two empty strings when the client has none.

        Args:
            host: of the registry.
            repository: there; empty when it is not known.

        Raises:
            OffloadError: the client is gone.
        """
        request_id = self._new_id()
        if self._forgone:
            return "", ""
        reply: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._credentials[request_id] = (host, repository, reply)
        try:
            await self._send(_credentials_request(request_id, host, repository))
            while not await _came(reply, CREDENTIALS_SECONDS):
                if not self.away:
                    return "", ""
                # It is asked again when it comes back; how long that may take is not said here.
            return reply.result()
        finally:
            del self._credentials[request_id]

    async def request_secret(self, secret_id: str) -> SecretReply:
        """Return what the client says of a secret.

        Raises:
            OffloadError: the client is gone or silent.
        """
        request_id = self._new_id()
        reply: asyncio.Future[SecretReply] = asyncio.get_running_loop().create_future()
        self._secrets[request_id] = (secret_id, reply)
        try:
            await self._send(_secret_request(request_id, secret_id))
            while not await _came(reply, SECRET_SECONDS):
                if not self.away:
                    raise ContextError(f"the client has not sent the secret {secret_id}")
            return reply.result()
        finally:
            del self._secrets[request_id]

    @asynccontextmanager
    async def ssh_stream(self, ssh_id: str) -> AsyncIterator[SshStream]:
        """Open a connection to an SSH agent of the client, for as long as the block runs.

        Raises:
            OffloadError: the client is gone.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(REPLY_SECONDS):
                await self._turned.wait()
        if self.away:
            raise NodeLostError("the client with the SSH agent is away")
        number = self._new_id()

        async def send(data: bytes, end: bool) -> None:
            await self._send(RunResponse(ssh_data=SshData(stream_id=number, data=data, end=end)))

        stream = self._ssh[number] = SshStream(send)
        try:
            await self._send(RunResponse(ssh_open=SshOpen(stream_id=number, ssh_id=ssh_id)))
            yield stream
        finally:
            del self._ssh[number]
            await finish(stream.close(), CLOSE_SECONDS)

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
        _, _, reply = self._credentials.get(message.request_id, ("", "", None))
        if reply is not None and not reply.done():
            reply.set_result((message.username, message.secret))

    def secret_reply(self, message: SecretReply) -> None:
        """Take a secret."""
        _, reply = self._secrets.get(message.request_id, ("", None))
        if reply is not None and not reply.done():
            reply.set_result(message)

    def ssh_data(self, message: SshData) -> None:
        """Take what an SSH agent says.

        Raises:
            UsageError: unasked or malformed.
        """
        stream = self._ssh.get(message.stream_id)
        if stream is not None:
            stream.take(message)

    def lose(self, error: OffloadError) -> None:
        """End everything that waits for the client, now and later; the first error holds."""
        self._error = self._error or error
        self._turned.set()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        for feed in list(self._listings.values()):
            feed.fail(self._error)
        for stream in self._ssh.values():
            stream.fail(self._error)
        replies: tuple[asyncio.Future[Any], ...] = (
            *(reply for _, _, reply in self._credentials.values()),
            *(reply for _, reply in self._secrets.values()),
        )
        for reply in replies:
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
        if self._away:
            # Another clock runs for those who are not there.
            self.heard()
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


async def _came(reply: asyncio.Future[Any], seconds: float) -> bool:
    done, _ = await asyncio.wait((reply,), timeout=seconds)
    return bool(done)


def _credentials_request(request_id: int, host: str, repository: str) -> RunResponse:
    return RunResponse(
        credentials_request=CredentialsRequest(
            request_id=request_id, host=host, repository=repository
        )
    )


def _secret_request(request_id: int, secret_id: str) -> RunResponse:
    return RunResponse(secret_request=SecretRequest(request_id=request_id, secret_id=secret_id))

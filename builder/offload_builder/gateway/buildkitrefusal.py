"""Answers BuildKit's clients for which there is no node: with the reason, in gRPC.

They would repeat a failed connection for 20 seconds and then say "context deadline exceeded".
Nothing else is served here, so no client certificate is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self, cast
from weakref import WeakKeyDictionary

from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.limits import ConnectionLimits
from offload_builder.buildkit.h2.messages import status_trailers
from offload_builder.buildkit.h2.stream import ConnectionLostError
from offload_core.aio import TaskSet
from offload_core.tls import BUILDKIT_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from offload_builder.buildkit.h2.stream import Http2Stream
    from offload_core.tls import KeyPair

# Not UNAVAILABLE, which buildx repeats without a word.
RESOURCE_EXHAUSTED = 8
HANDSHAKE_SECONDS = 5.0
LIFE_SECONDS = 60.0
"""A client that has its answer goes; one that stays is sent away."""
_LIMITS = ConnectionLimits(
    receive_window=65_536, max_streams=16, max_unread=1 << 20, max_headers=65_536, policed=True
)
_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


class BuildkitRefusal:
    """A listener behind a unix socket; use as an async context manager.

    Args:
        path: of the socket.
        keys: certificate for "*.buildkit.offload".
        reason: says why a project has no node.
    """

    def __init__(self, path: Path, keys: KeyPair, reason: Callable[[str], str]) -> None:
        self._path = path
        self._keys = keys
        self._reason = reason
        self._tasks = TaskSet()
        self._names: WeakKeyDictionary[ssl.SSLObject, str] = WeakKeyDictionary()
        self._stack = AsyncExitStack()
        self._context: ssl.SSLContext

    def use(self, keys: KeyPair) -> None:
        """Show another certificate from now on."""
        self._keys = keys
        self._context = self._tls()

    async def __aenter__(self) -> Self:
        self._context = self._tls()
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: _Refused(self._reason, self._tasks, self._take_name),
            str(self._path),
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=1.0,
        )
        self._stack.push_async_callback(self._tasks.close)
        self._stack.callback(server.close)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        context.sni_callback = self._note_name
        # The module takes files only; this one is ours alone and gone at once.
        with tempfile.NamedTemporaryFile(dir=self._path.parent) as file:
            file.write(self._keys.private_key_pem + self._keys.certificate_pem)
            file.flush()
            context.load_cert_chain(file.name)
        return context

    def _note_name(
        self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext
    ) -> None:
        self._names[connection] = (name or "").removesuffix(BUILDKIT_SUFFIX)
        connection.context = self._context

    def _take_name(self, connection: ssl.SSLObject) -> str:
        return self._names.get(connection, "")


class _Refused(asyncio.Protocol):
    def __init__(
        self,
        reason: Callable[[str], str],
        tasks: TaskSet,
        name: Callable[[ssl.SSLObject], str],
    ) -> None:
        self._reason = reason
        self._tasks = tasks
        self._name = name
        self._transport: asyncio.Transport | None = None
        self._project_id = ""
        self._writable = asyncio.Event()
        self._writable.set()
        self._http2 = Http2Connection(
            self._write, client=False, on_stream=self._refuse, limits=_LIMITS
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._project_id = self._name(transport.get_extra_info("ssl_object"))
        self._http2.start()
        self._tasks.start(self._live(), name="buildkit-refusal")

    def data_received(self, data: bytes) -> None:
        self._http2.feed(data)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None
        self._writable.set()
        self._http2.lose("the client closed the connection")

    def _refuse(self, stream: Http2Stream) -> None:
        stream.end(
            [*_HEADERS, *status_trailers(RESOURCE_EXHAUSTED, self._reason(self._project_id))]
        )

    async def _write(self, pieces: list[bytes | memoryview]) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ConnectionLostError("the connection is closed")
        self._transport.write(b"".join(pieces))
        await self._writable.wait()

    async def _live(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LIFE_SECONDS):
                    await self._http2.ended.wait()
        finally:
            await self._http2.close(0.2)
            if self._transport is not None:
                self._transport.close()

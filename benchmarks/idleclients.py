"""Many clients of BuildKit's API that are connected and do nothing, as programs between builds."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from typing import TYPE_CHECKING, Self

from benchmarks.model import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from benchmarks.buildkitport import TlsFiles

CONNECT_SECONDS = 60.0
# RFC 9113, section 3.4: the preface of a client and its settings, here none.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS, _PING, _ACK = 4, 6, 1
_AT_ONCE = 10


class IdleClients:
    """Connections that answer what has to be answered; a context manager.

    Args:
        address: HOST:PORT.
        server_name: name in TLS.
        tls: what a client shows and trusts.
        count: of connections.
    """

    def __init__(self, address: str, server_name: str, tls: TlsFiles, count: int) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._server_name = server_name
        self._count = count
        self._context = ssl.create_default_context(cafile=str(tls.ca))
        self._context.load_cert_chain(tls.certificate, tls.key)
        self._context.set_alpn_protocols(["h2"])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._serving: list[asyncio.Task[None]] = []
        self._broken = 0

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._await(self._open())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def require_all(self) -> None:
        """Refuse a figure of fewer connections.

        Raises:
            BenchmarkError: some have ended.
        """
        if self._broken:
            raise BenchmarkError(f"{self._broken} of {self._count} idle connections have ended")

    def _await(self, what: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(CONNECT_SECONDS)

    async def _open(self) -> None:
        places = asyncio.Semaphore(_AT_ONCE)

        async def one() -> None:
            async with places:
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, ssl=self._context, server_hostname=self._server_name
                )
                writer.write(_PREFACE)
                await writer.drain()
                # The settings of the other side: the connection is a whole one.
                await self._answer(reader, writer)
            self._serving.append(asyncio.ensure_future(self._serve(reader, writer)))

        await asyncio.gather(*(one() for _ in range(self._count)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            self._broken += 1
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readexactly(9)
        body = await reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, flags = head[3], head[4]
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            answer = body if kind == _PING else b""
            writer.write(len(answer).to_bytes(3, "big") + bytes((kind, _ACK, 0, 0, 0, 0)) + answer)
            await writer.drain()

    async def _close(self) -> None:
        for task in self._serving:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._serving, return_exceptions=True)

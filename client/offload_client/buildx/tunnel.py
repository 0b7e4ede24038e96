"""A local address that leads to the pool's BuildKit, for programs that know no certificates.

A unix socket that only this user can open. Each connection to it becomes a connection to the
gateway in TLS, with the user's certificate and the project as server name; bytes are passed on as
they are, in both directions at the pace of the slower side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import tempfile
from typing import TYPE_CHECKING, Self

import structlog

from offload_core.aio import TaskSet
from offload_core.errors import OffloadError
from offload_core.tls import BUILDKIT_SUFFIX
from offload_core.trust import split_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from types import TracebackType

    from offload_client.identity import StoredIdentity

CONNECT_SECONDS = 15.0
READ_BYTES = 256 << 10
"""As much as asyncio reads of TLS at once."""
BUFFER_BYTES = 1 << 20
MAX_CONNECTIONS = 128
log = structlog.get_logger(__name__)


class Tunnel:
    """Listens at a unix socket; use as an async context manager.

    Args:
        path: of the socket; its directory must be the user's alone.
        gateway: HOST:PORT.
        project: that builds belong to.
        identity: returns who the user is now, asked for each connection.
        on_failure: told in one sentence when the pool cannot be reached.
    """

    def __init__(
        self,
        path: Path,
        gateway: str,
        project: str,
        identity: Callable[[], Awaitable[StoredIdentity]],
        on_failure: Callable[[OffloadError | OSError], None],
    ) -> None:
        self._path = path
        self._address = split_address(gateway)
        self._server_name = f"{project}{BUILDKIT_SUFFIX}"
        self._identity = identity
        self._on_failure = on_failure
        self._tasks = TaskSet()
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._context: tuple[str, ssl.SSLContext] | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        # The mode counts from the first moment: connect() needs the right to write.
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(
                self._arrived, self._path, limit=BUFFER_BYTES
            )
        finally:
            os.umask(mask)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
        await self._tasks.close()

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.start(self._serve(reader, writer), name="tunnel")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._places:
            try:
                there = await self._connect()
            except (OffloadError, OSError, TimeoutError) as error:
                self._on_failure(error)
                writer.transport.abort()
                return
            try:
                await _splice((reader, writer), there)
            finally:
                for end in (writer, there[1]):
                    end.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._address
        async with asyncio.timeout(CONNECT_SECONDS):
            context = self._context_of(await self._identity())
            return await asyncio.open_connection(
                host, port, ssl=context, server_hostname=self._server_name, limit=BUFFER_BYTES
            )

    def _context_of(self, identity: StoredIdentity) -> ssl.SSLContext:
        if self._context is None or self._context[0] != identity.cache_key():
            self._context = identity.cache_key(), tls_context(identity)
        return self._context[1]


def tls_context(identity: StoredIdentity) -> ssl.SSLContext:
    """Return what a client needs to be `identity` at BuildKit's API of the pool."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=identity.keys.ca_pem.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    # The module takes files only; this one is ours alone and gone at once.
    with tempfile.NamedTemporaryFile() as file:
        file.write(identity.keys.certificate_pem + b"\n" + identity.keys.private_key_pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


async def _splice(
    here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Pass bytes on in both directions until one side ends; gRPC closes both at once."""
    flows = [
        asyncio.ensure_future(_flow(here[0], there[1])),
        asyncio.ensure_future(_flow(there[0], here[1])),
    ]
    try:
        await asyncio.wait(flows, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for flow in flows:
            flow.cancel()
        await asyncio.gather(*flows, return_exceptions=True)


async def _flow(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    # A side that goes away without a word ends the connection, as one that says so does.
    with contextlib.suppress(OSError, ssl.SSLError):
        while data := await source.read(READ_BYTES):
            target.write(data)
            await target.drain()
        target.close()
        await target.wait_closed()

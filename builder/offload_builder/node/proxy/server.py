"""The TLS port for BuildKit's clients.

TLS ends here with asyncio's ssl, as docker buildx offers no ALPN and grpcio refuses that. Clients
without a certificate, or with one that has expired, are let in and then refused in gRPC: they show
that sentence at once, where a failed handshake costs them 20 seconds and says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self, cast
from weakref import WeakKeyDictionary

import structlog
from cryptography import x509

from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.limits import ConnectionLimits
from offload_builder.buildkit.h2.stream import ConnectionLostError
from offload_builder.node.proxy.admission import GatewayDesk
from offload_builder.node.proxy.desk import Desk
from offload_builder.node.proxy.visitor import MAX_REQUEST_BYTES, Visitor
from offload_core.aio import TaskSet, stop
from offload_core.errors import AccessDeniedError, AuthenticationError, ConfigError, NodeLostError
from offload_core.tls import BUILDKIT_SUFFIX, certificate_identity
from offload_core.trust import join_address, split_address

if TYPE_CHECKING:
    from types import TracebackType

    from offload_builder.node.agent import NodeAgent
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.proxy.admission import Guest
    from offload_builder.revocations import Revocations
    from offload_core.tls import KeyPair

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS = 10.0
KEEPALIVE_SECONDS = 10.0
ANSWER_SECONDS = 20.0
"""A client that is stopped keeps its connection for ever, as the kernel answers for it."""
MAX_CONNECTIONS = 1024
MAX_OF_ONE = 256
"""Connections with the certificate of one token, so that nobody takes all of them."""
MAX_STRANGERS = 64
"""Connections without a certificate."""
STRANGER_SECONDS = 20.0
"""After so long they are closed; they are told to log in at their first call."""
STRANGER_REQUEST_BYTES = 256 << 10
WRITE_HIGH_WATER_BYTES = 1 << 20
CLIENT_LIMITS = ConnectionLimits(
    # A stream fills 0.6 Gbit/s at 100 ms with this.
    receive_window=8 << 20,
    max_streams=256,
    max_unread=32 << 20,
    max_headers=1 << 20,
    max_held_headers=4 << 20,
    policed=True,
)
STRANGER_LIMITS = ConnectionLimits(
    receive_window=64 << 10,
    max_streams=16,
    max_unread=256 << 10,
    max_headers=64 << 10,
    max_held_headers=128 << 10,
    policed=True,
)
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL: times are looked at when there is a way to say so."""


class BuildkitPort:
    """Listens for BuildKit's clients; use as an async context manager.

    Attributes:
        address: HOST:PORT that is listened on.
    """

    def __init__(self, config: NodeConfig, agent: NodeAgent, revocations: Revocations) -> None:
        self.address = ""
        self.revocations = revocations
        self._config = config
        self._agent = agent
        self._stack = AsyncExitStack()
        self._connections: set[_Connection] = set()
        self._names: WeakKeyDictionary[ssl.SSLObject, str] = WeakKeyDictionary()
        self.tasks = TaskSet(_task_failed)
        self._context: ssl.SSLContext
        self.desk: Desk

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            ConfigError: the address or the node's certificate cannot be used.
        """
        config, keys = self._config, self._agent.identity.keys
        host, port = split_address(config.buildkit_listen or _beside(config.listen))
        async with AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(GatewayDesk(config.gateway_address(), keys))
            self.desk = Desk(self._agent, gateway)
            self._context = self._tls()
            self.revocations.on_revoked(self._revoked)
            stack.push_async_callback(self.tasks.close)
            stack.push_async_callback(self._close_connections)
            loop = asyncio.get_running_loop()
            try:
                server = await loop.create_server(
                    lambda: _Connection(self),
                    host,
                    port,
                    ssl=self._context,
                    ssl_handshake_timeout=HANDSHAKE_SECONDS,
                    ssl_shutdown_timeout=1.0,
                )
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {join_address(host, port)}: {error.strerror or error}",
                    hint="set another address with buildkit_listen",
                ) from error
            stack.callback(server.close)
            bound = server.sockets[0].getsockname()
            self.address = join_address(host, bound[1])
            self._stack = stack.pop_all()
        log.info("buildkit.port.listening", address=self.address)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _tls(self) -> ssl.SSLContext:
        folder = self._config.data / "identity"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        context.load_verify_locations(cadata=self._agent.identity.keys.ca_pem.decode())
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= cast("ssl.VerifyFlags", _NO_CHECK_TIME)
        context.set_alpn_protocols(["h2"])
        # A resumed session would not show the client's certificate again.
        context.num_tickets = 0
        context.sni_callback = self._note_name
        return context

    def use(self, keys: KeyPair) -> None:
        """Serve with another certificate of the node, whose files are written already."""
        self._context = self._tls()
        self.desk.gateway.use(keys)

    def _revoked(self, token_ids: frozenset[str]) -> None:
        """End the connections of members who were revoked; they hear why when they come again."""
        self.desk.gateway.forget()
        for connection in list(self._connections):
            if connection.token_id in token_ids:
                connection.abort()

    def _note_name(
        self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext
    ) -> int | None:
        project_id = (name or "").lower().removesuffix(BUILDKIT_SUFFIX)
        if not name or project_id == name.lower():
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        self._names[connection] = project_id
        # The certificate, and the CAs of clients, as they are now.
        connection.context = self._context
        return None

    def project_of(self, connection: ssl.SSLObject) -> str:
        """Return the project that a client has named in TLS."""
        return self._names.get(connection, "")

    def opened(self, connection: _Connection) -> bool:
        """Take a connection in; False when there are too many, or too many of the same kind."""
        alike = sum(item.token_id == connection.token_id for item in self._connections)
        most = MAX_OF_ONE if connection.token_id else MAX_STRANGERS
        if len(self._connections) >= MAX_CONNECTIONS or alike >= most:
            log.warning(
                "buildkit.port.full",
                connections=len(self._connections),
                token_id=connection.token_id,
                of_token=alike,
            )
            return False
        self._connections.add(connection)
        return True

    def closed(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    def drain(self) -> None:
        """Take nothing new: clients open another connection, builds that wait are refused."""
        for connection in self._connections:
            connection.drain()

    async def _close_connections(self) -> None:
        for connection in list(self._connections):
            connection.abort()
        # Transports close in the next turns of the loop.
        for _ in range(100):
            if not self._connections:
                break
            await asyncio.sleep(0.01)


class _Connection(asyncio.BufferedProtocol):
    """One client, TLS already ended."""

    def __init__(self, port: BuildkitPort) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._http2: Http2Connection
        self._visitor: Visitor | None = None
        self._heard = 0.0
        self._loop = asyncio.get_running_loop()
        self._certificate = b""
        self._parsed: x509.Certificate | None = None
        self._project_id = ""
        self.token_id = ""
        """Behind its certificate; empty without one."""
        self._end: asyncio.TimerHandle | None = None

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio after the handshake."""
        self._transport = cast("asyncio.Transport", transport)
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        self._certificate = tls.getpeercert(binary_form=True) or b""
        if self._certificate:
            self._parsed = x509.load_der_x509_certificate(self._certificate)
            with contextlib.suppress(AuthenticationError):
                self.token_id = certificate_identity(self._parsed, datetime.now(UTC)).token_id
        if not self._port.opened(self):
            self._transport.abort()
            return
        known = bool(self.token_id)
        if not known:
            self._end = self._loop.call_later(STRANGER_SECONDS, self.abort)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        self._project_id = self._port.project_of(tls)
        peer = transport.get_extra_info("peername")
        address = join_address(peer[0], peer[1]) if peer else ""
        visitor = self._visitor = Visitor(
            self._port.desk,
            self._guest,
            address,
            MAX_REQUEST_BYTES if known else STRANGER_REQUEST_BYTES,
        )
        self._http2 = Http2Connection(
            self._write,
            client=False,
            on_stream=visitor.accept,
            limits=CLIENT_LIMITS if known else STRANGER_LIMITS,
        )
        self._http2.start()
        self._heard = self._loop.time()
        self._port.tasks.start(self._live(visitor), name=f"buildkit-client-{address}")

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Called by asyncio."""
        # Without a visitor the connection is being closed.
        return memoryview(bytearray(1)) if self._visitor is None else self._http2.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio."""
        if self._visitor is None:
            return
        self._heard = self._loop.time()
        self._http2.filled(nbytes)
        if self._http2.drained and self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        if self._end is not None:
            self._end.cancel()
        self._writable.set()
        self._port.closed(self)
        if self._visitor is not None:
            self._http2.lose(str(exc) if exc else "the client closed the connection")

    # Ours.

    async def _guest(self) -> Guest:
        """Return who it is, as far as that is allowed now."""
        if not self._parsed:
            raise AuthenticationError(
                "this builder needs the client certificate of a login; run: offload login, "
                "then offload buildx create"
            )
        # An expired certificate is refused here with what to do; the gateway looks at it as well.
        identity = certificate_identity(self._parsed, datetime.now(UTC))
        if identity.kind != "member":
            raise AccessDeniedError("only members of the pool build; this is a node's certificate")
        self._port.revocations.check(identity.token_id)
        return await self._port.desk.gateway.authorize(self._certificate, self._project_id)

    def drain(self) -> None:
        """Take no new calls; what runs goes on, what waits is refused."""
        if self._visitor is not None and self._transport is not None:
            self._http2.go_away()
            self._visitor.leave_queue(
                NodeLostError("the node is shutting down; start the build again")
            )

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    async def _write(self, pieces: list[bytes | memoryview]) -> None:
        if self._transport is None or self._transport.is_closing():
            raise ConnectionLostError("the connection is closed")
        self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        await self._writable.wait()

    async def _live(self, visitor: Visitor) -> None:
        """See to it that the client is alive; clean up when the connection is gone."""
        log.debug("buildkit.client.connected", project_id=self._project_id)
        keeper = asyncio.ensure_future(self._keep_alive())
        try:
            await self._http2.ended.wait()
        finally:
            await stop(keeper)
            await visitor.close()
            await self._http2.close(timeout=0.2)
            if self._transport is not None:
                self._transport.close()

    async def _keep_alive(self) -> None:
        while True:
            silence = self._loop.time() - self._heard
            if silence < KEEPALIVE_SECONDS:
                await asyncio.sleep(KEEPALIVE_SECONDS - silence)
                continue
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._http2.ping()
            except TimeoutError:
                log.info("buildkit.client.silent", project_id=self._project_id)
                self.abort()
                return
            except ConnectionLostError:
                return


def _beside(listen: str) -> str:
    """Return the host of an address with any free port."""
    return join_address(split_address(listen)[0], 0)


def _task_failed(name: str, error: BaseException) -> None:
    log.error("buildkit.connection.failed", task=name, exc_info=error)

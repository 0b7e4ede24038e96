"""The public port: routing by server name, the relay to nodes, and limits for strangers."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_core.errors import ConfigError
from tests.fixtures.gateway import RunningGateway
from tests.integration.attachednode import AttachedNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_core.tls import KeyPair

RELAYED_BYTES = 256 << 20
CHUNK = bytes(range(256)) * 1024
UNRECOGNIZED_NAME = b"\x15\x03\x03\x00\x02\x02\x70"


@pytest.fixture
async def gateway():
    async with RunningGateway() as running:
        yield running


class Echo(asyncio.BufferedProtocol):
    """Sends everything back, with back-pressure; closes when the other side has ended."""

    def __init__(self) -> None:
        self.buffer = bytearray(1 << 18)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(memoryview(self.buffer)[:nbytes]))

    def eof_received(self) -> bool:
        self.transport.write_eof()
        return False

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Sink(asyncio.BufferedProtocol):
    """Counts bytes and answers with their digest at the end."""

    def __init__(self) -> None:
        self.buffer = bytearray(1 << 18)
        self.digest = hashlib.sha256()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.digest.update(memoryview(self.buffer)[:nbytes])

    def eof_received(self) -> bool:
        self.transport.write(self.digest.digest())
        return False


@asynccontextmanager
async def serving(protocol: type, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, ssl=context)
    try:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        server.close()
        await server.wait_closed()


def files_of(keys: KeyPair, folder: Path) -> tuple[Path, Path]:
    (folder / "cert.pem").write_bytes(keys.certificate_pem)
    (folder / "key.pem").write_bytes(keys.private_key_pem)
    return folder / "cert.pem", folder / "key.pem"


def split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def hello_for(name: str) -> bytes:
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


async def answer_to(address: str, data: bytes, seconds: float = 5.0) -> bytes:
    reader, writer = await asyncio.open_connection(*split(address))
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""
    finally:
        writer.close()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "192.0.2.1:0", "no.such.host.invalid:1"])
async def test_address_that_cannot_be_used_is_a_configuration_error(address):
    with pytest.raises(ConfigError, match=r"cannot listen on|is not an address"):
        await RunningGateway(listen=address).__aenter__()


async def test_unknown_name_is_answered_with_an_alert(gateway):
    assert await answer_to(gateway.address, hello_for("example.org")) == UNRECOGNIZED_NAME
    assert await answer_to(gateway.address, hello_for("no.node.offload")) == UNRECOGNIZED_NAME


async def test_hello_without_a_name_is_answered_with_an_alert(gateway):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized"):
        await asyncio.open_connection(*split(gateway.address), ssl=context, server_hostname="")


async def test_other_protocols_are_cut_off(gateway):
    assert await answer_to(gateway.address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""


async def test_hello_byte_by_byte_is_understood(gateway):
    reader, writer = await asyncio.open_connection(*split(gateway.address))
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in hello_for("enroll.offload"):
        writer.write(bytes((byte,)))
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        # The record type of a ServerHello.
        assert (await reader.read(1)) == b"\x16"
    writer.close()


async def test_client_that_says_nothing_is_cut_off():
    async with RunningGateway(handshake_timeout=0.2) as gateway:
        assert await answer_to(gateway.address, b"", 2.0) == b""
        assert await answer_to(gateway.address, hello_for("enroll.offload")[:-1], 2.0) == b""


async def test_silent_connection_is_closed_after_the_idle_timeout():
    async with RunningGateway(idle_timeout=0.3) as gateway:
        hello = hello_for("enroll.offload")
        # The server's first flight comes, then nothing more is said by the client.
        assert (await answer_to(gateway.address, hello, 5.0))[:1] == b"\x16"


async def test_connections_beyond_the_limit_are_closed():
    async with RunningGateway(max_connections=2) as gateway:
        kept = [await asyncio.open_connection(*split(gateway.address)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await answer_to(gateway.address, hello_for("enroll.offload")) == b""
        for _, writer in kept:
            writer.close()
        await asyncio.sleep(0.05)
        assert (await answer_to_first(gateway.address, hello_for("enroll.offload"))) == b"\x16"


async def test_one_address_leaves_connections_to_others():
    async with RunningGateway(max_connections_per_address=2) as gateway:
        kept = [await asyncio.open_connection(*split(gateway.address)) for _ in range(2)]
        for _, writer in kept:
            writer.write(hello_for("enroll.offload"))
        await asyncio.sleep(0.1)
        assert await answer_to(gateway.address, hello_for("enroll.offload")) == b""
        host, port = split(gateway.address)
        reader, writer = await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0))
        writer.write(hello_for("enroll.offload"))
        async with asyncio.timeout(5):
            assert await reader.read(1) == b"\x16"
        for _, each in [*kept, (reader, writer)]:
            each.close()
        await asyncio.sleep(0.1)
        assert (await answer_to_first(gateway.address, hello_for("enroll.offload"))) == b"\x16"


async def answer_to_first(address: str, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*split(address))
    writer.write(data)
    async with asyncio.timeout(5):
        first = await reader.read(1)
    writer.close()
    return first


async def test_relay_keeps_tls_between_client_and_node(gateway, tmp_path):
    keys = await gateway.enroll_node("node-1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files_of(keys, tmp_path))
    trust = ssl.create_default_context(cadata=gateway.ca_pem.decode())
    async with (
        serving(Echo, context) as echo,
        AttachedNode(gateway, "node-1", keys, relay_endpoint=echo),
    ):
        reader, writer = await asyncio.open_connection(
            *split(gateway.address), ssl=trust, server_hostname="node-1.node.offload"
        )
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
        await writer.wait_closed()


async def test_node_without_a_relay_address_is_an_unknown_name(gateway):
    async with AttachedNode(gateway, "node-1", await gateway.enroll_node("node-1")):
        data = await answer_to(gateway.address, hello_for("node-1.node.offload"))
    assert data == UNRECOGNIZED_NAME


async def test_relay_to_a_node_that_does_not_listen_ends_with_an_alert(gateway):
    keys = await gateway.enroll_node("node-1")
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    async with AttachedNode(gateway, "node-1", keys, relay_endpoint=address):
        data = await answer_to(gateway.address, hello_for("node-1.node.offload"))
    assert data == b"\x15\x03\x03\x00\x02\x02\x50"


async def test_relay_passes_half_closed_connections(gateway):
    hello = hello_for("node-1.node.offload")
    async with (
        serving(Sink) as sink,
        AttachedNode(gateway, "node-1", await gateway.enroll_node("node-1"), relay_endpoint=sink),
    ):
        reader, writer = await asyncio.open_connection(*split(gateway.address))
        writer.write(hello + b"body")
        writer.write_eof()
        async with asyncio.timeout(5):
            assert await reader.read() == hashlib.sha256(hello + b"body").digest()
        writer.close()


async def test_slow_reader_holds_the_sender_back(gateway):
    hello = hello_for("node-1.node.offload")
    async with (
        serving(Echo) as echo,
        AttachedNode(gateway, "node-1", await gateway.enroll_node("node-1"), relay_endpoint=echo),
    ):
        reader, writer = await asyncio.open_connection(*split(gateway.address), limit=1 << 16)
        writer.write(hello)
        sent = 0
        with pytest.raises(TimeoutError):
            # Nobody reads what comes back: buffers fill up, then the sender has to wait.
            async with asyncio.timeout(2):
                while sent < 1 << 30:
                    writer.write(CHUNK)
                    await writer.drain()
                    sent += len(CHUNK)
        assert sent < 64 << 20
        writer.transport.abort()
        assert reader is not None


def exchange(address: str, hello: bytes) -> tuple[float, bytes]:
    """Send the relayed bytes with a blocking socket; return seconds and the sink's digest."""
    with socket.create_connection(split(address)) as connection:
        began = time.perf_counter()
        connection.sendall(hello)
        for _ in range(RELAYED_BYTES // len(CHUNK)):
            connection.sendall(CHUNK)
        connection.shutdown(socket.SHUT_WR)
        digest = b""
        while part := connection.recv(64):
            digest += part
        return time.perf_counter() - began, digest


async def test_relay_carries_256_megabytes_unchanged(gateway, record_property):
    hello = hello_for("node-1.node.offload")
    expected = hashlib.sha256(hello)
    for _ in range(RELAYED_BYTES // len(CHUNK)):
        expected.update(CHUNK)
    async with (
        serving(Sink) as sink,
        AttachedNode(gateway, "node-1", await gateway.enroll_node("node-1"), relay_endpoint=sink),
    ):
        seconds, digest = await asyncio.to_thread(exchange, gateway.address, hello)
        direct, _ = await asyncio.to_thread(exchange, sink, hello)
    assert digest == expected.digest()
    record_property("relay_megabytes_per_second", RELAYED_BYTES / 1e6 / seconds)
    record_property("direct_megabytes_per_second", RELAYED_BYTES / 1e6 / direct)

"""Connections over real TLS: the first endpoint that answers, and what is kept or replaced."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from offload_builder.gateway.ca import CertificateAuthority
from offload_client import connections as module
from offload_client.connections import Connections
from offload_client.identity import StoredIdentity
from offload_core.errors import NodeLostError
from offload_core.servercredentials import ReloadingCredentials
from offload_core.tls import GATEWAY_NAME, Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.open(tmp_path / "ca")


@pytest.fixture
def identity(authority: CertificateAuthority) -> StoredIdentity:
    end = datetime.now(UTC) + timedelta(days=30)
    keys, expires_at = authority.issue_member(Identity("member", "ann", "t1", "member"), end)
    return StoredIdentity(keys, expires_at.timestamp())


@asynccontextmanager
async def serving(authority: CertificateAuthority, port: int = 0) -> AsyncIterator[str]:
    server = aio.server(options=(("grpc.so_reuseport", 0),))
    credentials = ReloadingCredentials(authority.gateway_keys()).server(require_client=True)
    port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def ready(channel: aio.Channel | None) -> bool:
    return channel is not None and channel.get_state() is grpc.ChannelConnectivity.READY


async def test_next_endpoint_is_tried_at_once_when_one_refuses(
    authority: CertificateAuthority, identity: StoredIdentity, refused: str
) -> None:
    async with serving(authority) as address, Connections() as connections:
        began = time.monotonic()
        channel = await connections.connect([refused, address], GATEWAY_NAME, identity)
        assert ready(channel)
        assert time.monotonic() - began < 1


async def test_next_endpoint_is_tried_soon_when_one_is_silent(
    authority: CertificateAuthority, identity: StoredIdentity, silent: str
) -> None:
    async with serving(authority) as address, Connections() as connections:
        began = time.monotonic()
        channel = await connections.connect([silent, silent, address], GATEWAY_NAME, identity)
        assert ready(channel)
        assert time.monotonic() - began < 3


async def test_no_endpoint_answers(identity: StoredIdentity, refused: str) -> None:
    async with Connections() as connections:
        began = time.monotonic()
        assert await connections.connect([refused], GATEWAY_NAME, identity) is None
        assert time.monotonic() - began < 3


async def test_silence_everywhere_ends(
    identity: StoredIdentity, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    async with Connections() as connections:
        began = time.monotonic()
        assert await connections.connect([silent], GATEWAY_NAME, identity) is None
        assert time.monotonic() - began < 3


async def test_node_that_comes_back_in_a_moment_is_found(
    authority: CertificateAuthority, identity: StoredIdentity, refused: str
) -> None:
    async with Connections() as connections:
        connecting = asyncio.create_task(connections.connect([refused], GATEWAY_NAME, identity))
        await asyncio.sleep(0.2)
        async with serving(authority, int(refused.rpartition(":")[2])):
            assert ready(await connecting)


async def test_channel_is_kept_and_a_broken_one_replaced(
    authority: CertificateAuthority, identity: StoredIdentity
) -> None:
    async with Connections(persistent=True) as connections:
        async with serving(authority) as address:
            first = await connections.connect([address], GATEWAY_NAME, identity)
            assert await connections.connect([address], GATEWAY_NAME, identity) is first
        async with serving(authority, int(address.rpartition(":")[2])):
            again = await connections.connect([address], GATEWAY_NAME, identity)
            assert ready(again)


async def test_channel_that_was_silent_for_long_is_not_trusted(
    authority: CertificateAuthority, identity: StoredIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(authority) as address, Connections(persistent=True) as connections:
        first = await connections.connect([address], GATEWAY_NAME, identity)
        monkeypatch.setattr(module, "SILENCE_SECONDS", -1.0)
        second = await connections.connect([address], GATEWAY_NAME, identity)
        assert ready(second)
        assert second is not first


async def test_two_logins_never_share_a_channel(
    authority: CertificateAuthority, identity: StoredIdentity
) -> None:
    end = datetime.now(UTC) + timedelta(days=30)
    keys, _ = authority.issue_member(Identity("member", "ben", "t2", "member"), end)
    other = StoredIdentity(keys, end.timestamp())
    async with serving(authority) as address, Connections(persistent=True) as connections:
        first = await connections.gateway(address, identity)
        assert await connections.gateway(address, other) is not first
        assert await connections.gateway(address, identity) is first


async def test_connection_beside_another_is_one_of_its_own_and_is_closed(
    authority: CertificateAuthority, identity: StoredIdentity
) -> None:
    async with serving(authority) as address, Connections() as connections:
        first = await connections.connect([address], GATEWAY_NAME, identity)
        assert first is not None
        before = established(address)
        async with connections.beside(first) as second:
            assert ready(second)
            assert established(address) == before + 1
        assert second.get_state() is grpc.ChannelConnectivity.SHUTDOWN
        assert ready(first)
        # Also when the first one was given up meanwhile.
        connections.drop(address, GATEWAY_NAME, identity)
        async with connections.beside(first) as third:
            assert ready(third)


async def test_connection_beside_one_to_a_place_that_is_gone_is_refused(
    authority: CertificateAuthority, identity: StoredIdentity
) -> None:
    async with Connections() as connections:
        async with serving(authority) as address:
            first = await connections.connect([address], GATEWAY_NAME, identity)
            assert first is not None
        with pytest.raises(NodeLostError, match=address):
            async with connections.beside(first):
                pass


def established(address: str) -> int:
    """Return the connections that an endpoint of this machine has taken."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return sum(line[1].endswith(port) and line[3] == "01" for line in lines)

"""One connection of a connector, against a node that speaks the contract."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import asynccontextmanager

import grpc
import pytest

from offload_client.connect.carrying import carry, open_connection
from offload_core.errors import NodeLostError, NotFoundError
from offload_core.interceptors import ErrorInterceptor
from offload_proto.v1.connector_service_pb2 import CarryResponse, Ended
from offload_proto.v1.connector_service_pb2_grpc import (
    TunnelServiceServicer,
    add_TunnelServiceServicer_to_server,
)


class Node(TunnelServiceServicer):
    """Answers "PING" with "PONG", and ends as `how` says."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.got = b""

    async def Carry(self, request_iterator, context):
        async for request in request_iterator:
            kind = request.WhichOneof("message")
            if self.how == "unknown":
                raise NotFoundError("nobody waits for it")
            if kind == "open":
                yield CarryResponse(data=b"PING")
            elif kind == "data":
                self.got += request.data
                if self.how == "gone":
                    return
                yield CarryResponse(ended=Ended())
            elif kind == "ended":
                return


@asynccontextmanager
async def node(how: str):
    server = grpc.aio.server(interceptors=(ErrorInterceptor("this node"),))
    one = Node(how)
    add_TunnelServiceServicer_to_server(one, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield one, channel
    finally:
        await server.stop(0)


@asynccontextmanager
async def host(*, closes: bool):
    """A host that answers the first bytes, and then closes or says nothing more."""
    seen: list[bytes] = []

    async def answer(reader, writer):
        seen.append(await reader.readexactly(4))
        writer.write(b"PONG")
        await writer.drain()
        try:
            seen.append(await reader.read())
        except ConnectionResetError:
            seen.append(b"reset")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        made = await open_connection("localhost", server.sockets[0].getsockname()[1])
        assert isinstance(made, socket.socket)
        yield made, seen
        async with asyncio.timeout(5):
            while len(seen) < 2 and closes:
                await asyncio.sleep(0.01)


async def test_both_directions_are_carried_to_their_ends():
    async with node("whole") as (one, channel), host(closes=True) as (connection, seen):
        async with asyncio.timeout(10):
            carried = await carry(channel, "c" * 32, connection)
        assert (carried.from_build, carried.to_build, carried.whole) == (4, 4, True)
        assert one.got == b"PONG"
    assert seen == [b"PING", b""]


async def test_a_build_that_has_gone_resets_a_host_that_says_nothing():
    async with node("gone") as (_, channel), host(closes=True) as (connection, seen):
        async with asyncio.timeout(10):
            carried = await carry(channel, "c" * 32, connection)
        assert not carried.whole
    assert seen == [b"PING", b"reset"]


async def test_a_node_that_does_not_know_the_call_is_told():
    async with node("unknown") as (_, channel), host(closes=False) as (connection, _):
        with pytest.raises(NodeLostError, match="nobody waits for it"):
            async with asyncio.timeout(10):
                await carry(channel, "c" * 32, connection)


async def test_a_host_that_is_not_there_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        await open_connection("127.0.0.1", port)


async def test_names_that_no_server_answers_for_hold_up_no_other(monkeypatch):
    answer, look_up = threading.Event(), socket.getaddrinfo

    def slow(host, *rest, **options):
        if host == "slow.corp":
            answer.wait(20)
            raise OSError("nobody knows it")
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with socket.create_server(("127.0.0.1", 0)) as server:
        waiting = [asyncio.create_task(open_connection("slow.corp", 80)) for _ in range(64)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            (await open_connection("127.0.0.1", server.getsockname()[1])).close()
        answer.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
    assert {str(error) for error in found} == {"nobody knows it"}

"""Calls of connectors at a node, over gRPC as it is served there."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import grpc
import pytest

from offload_builder.egress.connectors.tunnels import Arrival, Tunnels
from offload_builder.node import tunnelservice
from offload_builder.revocations import RevocationGate, Revocations
from offload_core.interceptors import ErrorInterceptor
from offload_core.tls import Identity
from offload_core.versions import call_metadata
from offload_proto.v1.connector_service_pb2 import CarryRequest, Open
from offload_proto.v1.connector_service_pb2_grpc import (
    TunnelServiceStub,
    add_TunnelServiceServicer_to_server,
)


@asynccontextmanager
async def served(monkeypatch):
    """Give tunnels, what they ask the gateway, and a stub; who calls is asked elsewhere."""
    ann = Identity("ann", "member", "t", "member")
    monkeypatch.setattr(tunnelservice, "member_identity", lambda _: ann)
    asked = []
    server = grpc.aio.server(
        interceptors=(RevocationGate(Revocations()), ErrorInterceptor("this node"))
    )
    async with Tunnels(lambda message: asked.append(message) or True, print) as tunnels:
        service = tunnelservice.TunnelService(tunnels)
        add_TunnelServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield tunnels, asked, TunnelServiceStub(channel)
        finally:
            await server.stop(0)


@pytest.mark.timeout(60)
async def test_a_connection_that_is_cut_while_nothing_is_taken_is_free_and_told_later(monkeypatch):
    loop = asyncio.get_running_loop()
    async with served(monkeypatch) as (tunnels, asked, stub):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            inner, _ = listener.accept()
        client.setblocking(False)
        arrival = Arrival(inner, "shop", "shop", "a.corp", 80, "198.19.0.1", "100.64.8.3")
        work = loop.create_task(tunnels.carry(arrival))
        await asyncio.sleep(0.01)
        call = stub.Carry(metadata=call_metadata())
        call_id = asked[0].connection_wish.call_id
        await call.write(CarryRequest(open=Open(call_id=call_id)))
        # More than fits between the build and a connector that reads nothing.
        flood = loop.create_task(loop.sock_sendall(client, bytes(64 << 20)))
        async with asyncio.timeout(10):
            while not (tunnels._open and next(iter(tunnels._open)).idle_seconds() > 0.5):
                await asyncio.sleep(0.05)
            (tunnel,) = tunnels._open
            tunnel.cut()
            await work
            with pytest.raises(ConnectionResetError):
                await flood
            client.close()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert caught.value.details() == "the connection was cut"


async def test_a_member_has_a_bounded_number_of_calls(monkeypatch):
    monkeypatch.setattr(tunnelservice, "MAX_CALLS", 1)
    async with served(monkeypatch) as (_, _, stub):
        first = stub.Carry(metadata=call_metadata())
        await asyncio.sleep(0.1)
        for _ in range(2):
            second = stub.Carry(metadata=call_metadata())
            assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await first.write(CarryRequest(open=Open(call_id="nobody's")))
        assert await first.code() is grpc.StatusCode.NOT_FOUND
        third = stub.Carry(metadata=call_metadata())
        await third.write(CarryRequest(open=Open(call_id="nobody's")))
        assert await third.code() is grpc.StatusCode.NOT_FOUND

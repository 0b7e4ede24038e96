"""One connection: bytes between a host of this network and a stream to a node."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from offload_client.bytepipe import in_thread
from offload_core.aio import stop
from offload_core.errors import NodeLostError
from offload_core.sockets import PIECE_BYTES, keep_alive, reset
from offload_core.versions import call_metadata
from offload_proto.v1.connector_service_pb2 import CarryRequest, Ended, Open
from offload_proto.v1.connector_service_pb2_grpc import TunnelServiceStub

if TYPE_CHECKING:
    from grpc import aio

CONNECT_SECONDS = 10.0
_ADDRESS_SECONDS = 4.0
_WRITE_FAILED = "Internal error from Core"
_BROKEN = (OSError, grpc.RpcError, asyncio.InvalidStateError)


@dataclass
class Carried:
    """What has passed.

    Attributes:
        to_build: bytes.
        from_build: bytes.
        whole: both directions came to their ends.
    """

    to_build: int = 0
    from_build: int = 0
    whole: bool = False


async def open_connection(host: str, port: int) -> socket.socket:
    """Connect to a host, by any of its addresses.

    Raises:
        OSError: it does not exist, or does not answer within `CONNECT_SECONDS`.
    """
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"{host} has no address")
    async with asyncio.timeout(CONNECT_SECONDS):
        # A thread for each: names that no server answers for would keep the few of the loop.
        found = await in_thread(
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), name="look-up"
        )
        for family, kind, protocol, _, address in found:
            try:
                made = socket.socket(family, kind, protocol)
            except OSError as error:
                # A machine without IPv6, for example.
                failure = error
                continue
            made.setblocking(False)
            try:
                async with asyncio.timeout(_ADDRESS_SECONDS):
                    await loop.sock_connect(made, address)
                keep_alive(made)
            except OSError as error:
                made.close()
                failure = error
            except BaseException:
                made.close()
                raise
            else:
                return made
    raise failure


async def carry(channel: aio.Channel, call_id: str, connection: socket.socket) -> Carried:
    """Carry a connection to its end, and close it.

    One piece is on its way in each direction: whoever is slow holds up the other side.

    Raises:
        NodeLostError: the node does not take it, or was lost before both directions had ended.
    """
    loop = asyncio.get_running_loop()
    call = TunnelServiceStub(channel).Carry(metadata=call_metadata())
    carried = Carried()

    ended = {"host": False, "build": False}

    async def to_build() -> None:
        await call.write(CarryRequest(open=Open(call_id=call_id)))
        while data := await loop.sock_recv(connection, PIECE_BYTES):
            await call.write(CarryRequest(data=data))
            carried.to_build += len(data)
        await call.write(CarryRequest(ended=Ended()))
        ended["host"] = True
        await call.done_writing()

    async def from_build() -> None:
        async for message in call:
            if message.WhichOneof("message") == "ended":
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                ended["build"] = True
                continue
            await loop.sock_sendall(connection, message.data)
            carried.from_build += len(message.data)

    sending, taking = (loop.create_task(way()) for way in (to_build, from_build))
    try:
        # The node ends the stream when both directions are over, or the build has gone.
        done, _ = await asyncio.wait((sending, taking), return_when=asyncio.FIRST_COMPLETED)
        if sending in done and sending.exception() is None:
            await asyncio.wait((taking,))
        failures = [way.exception() for way in (sending, taking) if way.done()]
        carried.whole = all(ended.values()) and (not taking.done() or taking.exception() is None)
        for broken in filter(None, failures):
            if isinstance(broken, grpc.RpcError):
                if _write_failed(broken):
                    continue
                raise NodeLostError(f"the node ended the connection: {_details(broken)}")
            if not isinstance(broken, _BROKEN):
                raise broken
    finally:
        call.cancel()
        await stop(sending, taking, expected=_BROKEN)
        if carried.whole:
            connection.close()
        else:
            reset(connection)
    return carried


def _write_failed(error: grpc.RpcError) -> bool:
    """Return whether a call ended while a piece was on its way; grpc then hides how it ended."""
    return isinstance(error, grpc.aio.AioRpcError) and error.details() == _WRITE_FAILED


def _details(error: grpc.RpcError) -> str:
    return str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else str(error)

"""Connections of builds that connectors carry: called for, claimed, and taken to their end."""

from __future__ import annotations

import asyncio
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import structlog

from offload_core.aio import TaskSet, stop
from offload_core.errors import NotFoundError
from offload_core.sockets import PIECE_BYTES, keep_alive, reset, wake
from offload_proto.v1.connector_service_pb2 import CarryResponse, Destination, Ended
from offload_proto.v1.nodes_service_pb2 import AttachRequest, ConnectionWish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from offload_proto.v1.connector_service_pb2 import CarryRequest
    from offload_proto.v1.nodes_service_pb2 import AttachResponse

_log = structlog.get_logger(__name__)

CALL_SECONDS = 20.0
"""A connector has ten to reach the host, and ten more for its way to this node."""
IDLE_SECONDS = 900.0
"""A connection on which nothing has moved for so long is cut."""
_SWEEP_SECONDS = 30.0
_SEND_TRIES, _SEND_PAUSE_SECONDS = 20, 0.05
"""The way to the gateway has room for some dozens of messages; a burst of connections is more."""
_GATEWAY_AWAY = "the gateway does not answer the node"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A connection of a build to a name that connectors serve.

    Attributes:
        connection: socket to the build.
        place: whose it is.
        project_id: of the place.
        name: that it wants.
        port: that it wants.
        address: that stands for the name.
        source: address of the step, or of the place's BuildKit.
    """

    connection: socket.socket
    place: str
    project_id: str
    name: str
    port: int
    address: str
    source: str


class Tunnel:
    """One connection of a build and the stream of the connector that carries it."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.over = asyncio.Event()
        self.was_cut = False
        self._connection = arrival.connection
        self._active = asyncio.get_running_loop().time()
        self._writing: asyncio.Task[None] | None = None
        self._giving: asyncio.Task[Any] | None = None
        """Who waits for the connector to take what it is sent."""
        self._whole = False
        """Both directions came to their ends."""

    def idle_seconds(self) -> float:
        """Return for how long nothing has moved."""
        return asyncio.get_running_loop().time() - self._active

    def cut(self) -> None:
        """End it now; the build sees a reset."""
        self._whole, self.was_cut = False, True
        if self._writing is not None:
            self._writing.cancel()
        wake(self._connection)
        if self._giving is not None:
            # A connector that takes nothing would hold the connection for as long as it likes.
            self._giving.cancel()

    async def carry(
        self, requests: AsyncIterator[CarryRequest]
    ) -> AsyncGenerator[CarryResponse, None]:
        """Yield what the build sends, and take what the host sends, until both have ended.

        One piece is on its way in each direction: whoever is slow holds up the other side.
        """
        loop = asyncio.get_running_loop()
        writing = self._writing = loop.create_task(self._write(requests))
        # A write or a stream that breaks ends the read as well.
        writing.add_done_callback(lambda _: None if self._whole else wake(self._connection))
        try:
            with suppress(OSError):
                while data := await loop.sock_recv(self._connection, PIECE_BYTES):
                    self._active = loop.time()
                    self._giving = asyncio.current_task()
                    yield CarryResponse(data=data)
                    self._giving = None
                if not writing.done() or self._whole:
                    yield CarryResponse(ended=Ended())
                    await asyncio.wait((writing,))
        finally:
            self._giving = None
            await stop(writing, expected=(Exception,))
            if self._whole:
                self._connection.close()
            else:
                reset(self._connection)
            self.over.set()

    async def _write(self, requests: AsyncIterator[CarryRequest]) -> None:
        """Give the build what the host sends."""
        loop = asyncio.get_running_loop()
        async for request in requests:
            self._active = loop.time()
            if request.WhichOneof("message") == "ended":
                self._connection.shutdown(socket.SHUT_WR)
                self._whole = True
                return
            if len(request.data) > PIECE_BYTES:
                # A build that reads slowly would have the node keep it, for each connection.
                one = self.arrival
                _log.warning(
                    "connectors.piece.too_large",
                    place=one.place,
                    target=f"{one.name}:{one.port}",
                    bytes=len(request.data),
                )
                return
            await loop.sock_sendall(self._connection, request.data)


class Tunnels:
    """Of one node; an async context manager.

    Args:
        send: sends a message to the gateway; False when that cannot be now.
        refused: hears of a connection that cannot be had, and why.
    """

    def __init__(
        self, send: Callable[[AttachRequest], bool], refused: Callable[[Arrival, str], None]
    ) -> None:
        self._send = send
        self._refused = refused
        self._calls: dict[str, tuple[Arrival, asyncio.Future[Tunnel | str]]] = {}
        self._open: set[Tunnel] = set()
        self._tasks = TaskSet()

    async def __aenter__(self) -> Self:
        self._tasks.start(self._sweep(), name="connectors.sweep")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()
        for tunnel in self._open:
            tunnel.cut()

    async def carry(self, arrival: Arrival) -> None:
        """Call for a connector, and wait until the connection is at its end."""
        connection = arrival.connection
        connection.setblocking(False)
        keep_alive(connection)
        found: Tunnel | str
        try:
            found = await self._called(arrival)
        except BaseException:
            reset(connection)
            raise
        if isinstance(found, str):
            reset(connection)
            self._refused(arrival, found)
            return
        self._open.add(found)
        try:
            await found.over.wait()
        finally:
            self._open.discard(found)
            if not found.over.is_set():
                found.cut()

    async def _called(self, arrival: Arrival) -> Tunnel | str:
        """Return the tunnel that a connector has opened, or why there is none."""
        call_id = secrets.token_hex(16)
        wish = ConnectionWish(
            call_id=call_id,
            project_id=arrival.project_id,
            destination=Destination(host=arrival.name, port=arrival.port),
        )
        answer: asyncio.Future[Tunnel | str] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = (arrival, answer)
        try:
            if not await self._asked(AttachRequest(connection_wish=wish)):
                return _GATEWAY_AWAY
            async with asyncio.timeout(CALL_SECONDS):
                return await answer
        except TimeoutError:
            return f"the connector did not answer within {CALL_SECONDS:.0f} seconds"
        finally:
            del self._calls[call_id]

    async def _asked(self, request: AttachRequest) -> bool:
        """Ask the gateway; where many want that at once, wait for a turn."""
        for _ in range(_SEND_TRIES):
            if self._send(request):
                return True
            await asyncio.sleep(_SEND_PAUSE_SECONDS)
        return False

    def take_message(self, message: AttachResponse) -> None:
        """Hear that a connection cannot be had."""
        refused = message.call_refused
        _, answer = self._calls.get(refused.call_id, (None, None))
        if answer is not None and not answer.done():
            answer.set_result(refused.reason or "the connector refused it")

    def claim(self, call_id: str) -> Tunnel:
        """Return the tunnel of a call for the connector that answers it.

        Raises:
            NotFoundError: nobody waits for it, or not any more.
        """
        arrival, answer = self._calls.get(call_id, (None, None))
        if arrival is None or answer is None or answer.done():
            raise NotFoundError("the build that wanted this connection does not wait for it")
        tunnel = Tunnel(arrival)
        answer.set_result(tunnel)
        return tunnel

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for tunnel in list(self._open):
                if tunnel.idle_seconds() > IDLE_SECONDS:
                    one = tunnel.arrival
                    _log.info("connectors.idle", place=one.place, target=f"{one.name}:{one.port}")
                    tunnel.cut()

"""Where builds enter: a listener for each host and port that a connector serves to a place now."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

import structlog

from offload_builder.egress.connectors.tunnels import Arrival
from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import Attempt
from offload_core.aio import TaskSet
from offload_core.errors import InternalError, OffloadError
from offload_core.sockets import reset

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
    from ipaddress import IPv4Address

    from offload_builder.egress.connectors.addresses import ConnectedAddresses
    from offload_builder.egress.policy.model import Address, EffectivePolicy
    from offload_proto.v1.nodes_service_pb2 import AttachResponse

_log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 256
"""Connections of one place that are open at the same time."""
PER_SECOND = 500
"""New connections of one place, after a burst of as many; more wait. Each is a question to the
gateway and work of this process, which others share."""
RETRY_SECONDS = 2.0
_PAUSE_SECONDS = 0.2

Destination = tuple[str, int]
"""Name and port."""


class Gate(Protocol):
    """The firewall, as far as doors need it."""

    async def listen(self, address: Address, port: int) -> socket.socket:
        """Return a socket that listens in the router."""

    async def serve_connected(self, key: str, doors: Iterable[tuple[Address, int]]) -> None:
        """Let a project reach just these."""


@dataclass(eq=False)
class _Door:
    address: IPv4Address
    port: int
    listener: socket.socket
    accepting: asyncio.Task[None] | None = None
    open: set[asyncio.Task[None]] = field(default_factory=set)

    def close(self) -> None:
        # While somebody waits at the socket, the loop has its number: who waits closes it.
        if self.accepting is None:
            self.listener.close()
        else:
            self.accepting.cancel()


@dataclass(eq=False)
class _Place:
    key: str
    project_id: str
    doors: dict[Destination, _Door] = field(default_factory=dict)
    connections: int = 0
    due: float = 0.0
    """When all connections so far have had their share of time, in seconds of the loop."""
    tasks: TaskSet = field(default_factory=TaskSet)

    def wait(self, now: float) -> float:
        """Count a new connection; return after how many seconds the next one may come."""
        self.due = max(self.due, now) + 1 / PER_SECOND
        return max(0.0, self.due - now - 1)


class ConnectorDoors:
    """Of one node; an async context manager.

    Args:
        gate: the firewall.
        addresses: that stand for names.
        policy_of: returns what holds at a place now.
        carry: takes a connection to its end; it closes its socket.
        refused: hears of a connection that is not taken, and why.
    """

    def __init__(
        self,
        gate: Gate,
        addresses: ConnectedAddresses,
        policy_of: Callable[[str], EffectivePolicy],
        carry: Callable[[Arrival], Coroutine[None, None, None]],
        refused: Callable[[Arrival, str], None],
    ) -> None:
        self._gate = gate
        self._addresses = addresses
        self._policy_of = policy_of
        self._carry = carry
        self._refused = refused
        self._served: dict[str, frozenset[Destination]] = {}
        self._places: dict[str, _Place] = {}
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks = TaskSet(_crashed)

    async def __aenter__(self) -> Self:
        self._tasks.start(self._run(), name="connectors.doors")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    def take_message(self, message: AttachResponse) -> None:
        """Hear what the connectors that are online serve; it replaces what was heard before."""
        self._served = {
            project.project_id: frozenset((item.host, item.port) for item in project.destinations)
            for project in message.served_destinations.projects
        }
        self._wake.set()

    @asynccontextmanager
    async def serving(self, key: str, project_id: str) -> AsyncIterator[None]:
        """Give a place what connectors of its project serve, while the context is open."""
        if key in self._places:
            raise InternalError(f"connectors serve the place {key} already")
        place = _Place(key, project_id)
        self._places[key] = place
        self._wake.set()
        try:
            yield
        finally:
            del self._places[key]
            async with self._changing:
                for door in place.doors.values():
                    door.close()
                place.doors.clear()
            await place.tasks.close()
            self._addresses.forget(key)

    async def refresh(self) -> None:
        """Have the doors of all places follow policies and connectors.

        Raises:
            OffloadError: it cannot be done somewhere; what is open there stays open. All other
                places follow.
        """
        failure: OffloadError | OSError | None = None
        async with self._changing:
            for place in list(self._places.values()):
                try:
                    await self._follow(place)
                except (OffloadError, OSError) as error:
                    _log.warning("connectors.place.failed", place=place.key, cause=str(error))
                    failure = error
        if failure is not None:
            raise failure

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.refresh()
            except (OffloadError, OSError) as error:
                _log.error("connectors.doors.failed", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                self._wake.set()

    async def _follow(self, place: _Place) -> None:
        served = self._served.get(place.project_id, frozenset())
        if self._places.get(place.key) is not place or not (served or place.doors):
            return
        policy = Evaluator(self._policy_of(place.key))
        for end, door in place.doors.items():
            if not _allows(policy, end):
                # Of what is not allowed any more, nothing stays open.
                for task in door.open:
                    task.cancel()
        wanted = {end for end in served if _allows(policy, end)}
        if wanted == place.doors.keys():
            return
        kept = {key: door for key, door in place.doors.items() if key in wanted}
        opened: dict[Destination, _Door] = {}
        try:
            for name, port in wanted - kept.keys():
                address = self._addresses.of(place.key, name)
                listener = await self._gate.listen(address, port)
                opened[name, port] = _Door(address, port, listener)
            doors = kept | opened
            ends = [(door.address, door.port) for door in doors.values()]
            await self._gate.serve_connected(place.key, ends)
        except BaseException:
            for door in opened.values():
                door.close()
            raise
        for key in place.doors.keys() - wanted:
            place.doors[key].close()
        for (name, port), door in opened.items():
            accepting = self._accept(place, door, name)
            door.accepting = place.tasks.start(accepting, name=f"connectors.{name}:{port}")
            # Here, as a task that is cancelled before it has begun closes nothing.
            door.accepting.add_done_callback(partial(_close, door.listener))
        place.doors = doors
        shown = sorted(f"{name}:{port}" for name, port in doors)
        _log.info("connectors.doors.changed", place=place.key, served=shown)

    async def _accept(self, place: _Place, door: _Door, name: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(door.listener)
            except OSError as error:
                # Such as too many open files; others may be closed soon.
                _log.warning("connectors.accept.failed", place=place.key, cause=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            address = str(door.address)
            self._arrived(
                place,
                door,
                Arrival(connection, place.key, place.project_id, name, door.port, address, peer[0]),
            )
            # The loop gives a connection that is there without letting anybody else run.
            full = place.connections >= MAX_CONNECTIONS
            await asyncio.sleep(_PAUSE_SECONDS if full else place.wait(loop.time()))

    def _arrived(self, place: _Place, door: _Door, arrival: Arrival) -> None:
        if place.connections >= MAX_CONNECTIONS:
            reset(arrival.connection)
            many = f"builds of the project have {MAX_CONNECTIONS} connections open already"
            self._refused(arrival, many)
            return
        place.connections += 1
        begun = False

        async def take() -> None:
            nonlocal begun
            begun = True
            await self._carry(arrival)

        def over(_: object) -> None:
            place.connections -= 1
            door.open.discard(task)
            if not begun:
                # Cancelled before it could close the connection.
                reset(arrival.connection)

        task = place.tasks.start(take(), name=f"connectors.carry.{arrival.name}")
        door.open.add(task)
        task.add_done_callback(over)


def _allows(policy: Evaluator, end: Destination) -> bool:
    name, port = end
    return policy.connected(name) and policy.verdict(Attempt(name, None, port)).allowed


def _close(listener: socket.socket, _: object) -> None:
    listener.close()


def _crashed(name: str, error: BaseException) -> None:
    _log.error("connectors.task.failed", task=name, exc_info=error)

"""Names of connectors at a node: addresses, doors, and tunnels, over sockets of this process."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from contextlib import aclosing, asynccontextmanager

import pytest

from offload_builder.egress.connectors.addresses import ConnectedAddresses
from offload_builder.egress.connectors.doors import MAX_CONNECTIONS, ConnectorDoors
from offload_builder.egress.connectors.tunnels import Arrival, Tunnels
from offload_builder.egress.policy.model import EffectivePolicy
from offload_builder.egress.policy.reading import read_text
from offload_core.errors import InternalError, NotFoundError, QuotaExceededError
from offload_core.sockets import PIECE_BYTES, reset
from offload_proto.v1.connector_service_pb2 import CallRefused, CarryRequest, Ended
from offload_proto.v1.nodes_service_pb2 import AttachResponse

TEXT = """\
posture = "allowlist"
[[rule]]
id = "office"
allow = ["a.corp.example", "b.corp.example"]
ports = [80, 81]
via = "connector"
[[rule]]
id = "web"
allow = ["public.example"]
"""
POLICY = EffectivePolicy(read_text(TEXT, file="p").require())


def test_two_places_never_share_an_address_and_each_keeps_its_own():
    addresses = ConnectedAddresses(ipaddress.ip_network("198.19.0.0/29"))
    first = addresses.of("shop", "a.example")
    assert addresses.of("shop", "a.example") == first
    assert addresses.name("shop", str(first)) == "a.example"
    assert addresses.name("other", str(first)) == ""
    others = {addresses.of("other", f"{n}.example") for n in range(5)}
    assert len(others) == 5 and first not in others
    with pytest.raises(QuotaExceededError, match="no address left"):
        addresses.of("third", "a.example")
    addresses.forget("other")
    assert addresses.of("third", "a.example") in others


class Loopback:
    """The firewall of these tests: listeners are on this machine's loopback."""

    def __init__(self) -> None:
        self.served: dict[str, set[tuple[str, int]]] = {}
        self.ports: dict[int, int] = {}
        self.broken = False

    async def listen(self, address, port):
        made = socket.create_server(("127.0.0.1", 0))
        made.setblocking(False)
        self.ports[port] = made.getsockname()[1]
        return made

    async def serve_connected(self, key, doors):
        if self.broken:
            raise InternalError("nftables refused it")
        self.served[key] = {(str(address), port) for address, port in doors}


def served(**projects: list[tuple[str, int]]) -> AttachResponse:
    message = AttachResponse()
    message.served_destinations.SetInParent()
    for project_id, pairs in projects.items():
        one = message.served_destinations.projects.add(project_id=project_id)
        for host, port in pairs:
            one.destinations.add(host=host, port=port)
    return message


async def test_doors_follow_what_is_served_and_what_the_policy_permits():
    gate, addresses = Loopback(), ConnectedAddresses()
    taken: list[Arrival] = []

    async def carry(arrival: Arrival) -> None:
        taken.append(arrival)
        reset(arrival.connection)

    async with (
        ConnectorDoors(gate, addresses, lambda _: POLICY, carry, print) as doors,
        doors.serving("shop", "shop"),
        doors.serving("other", "other"),
    ):
        wanted = [("a.corp.example", 80), ("a.corp.example", 22), ("public.example", 80)]
        doors.take_message(served(shop=wanted))
        await doors.refresh()
        a = str(addresses.of("shop", "a.corp.example"))
        assert gate.served == {"shop": {(a, 80)}}
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.ports[80])
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        (arrival,) = taken
        assert (arrival.name, arrival.port, arrival.project_id) == (
            "a.corp.example", 80, "shop",
        )  # fmt: skip
        # What cannot be done changes nothing.
        gate.broken = True
        doors.take_message(served())
        with pytest.raises(InternalError):
            await doors.refresh()
        gate.broken = False
        await doors.refresh()
        await asyncio.sleep(0.01)
        assert gate.served["shop"] == set()
        with pytest.raises(OSError, match=r"Connect call failed"):
            await asyncio.open_connection("127.0.0.1", gate.ports[80])


async def test_a_place_has_a_bounded_number_of_connections():
    gate, addresses = Loopback(), ConnectedAddresses()
    refused: list[str] = []
    hold = asyncio.Event()

    async def carry(arrival: Arrival) -> None:
        with arrival.connection:
            await hold.wait()

    async with (
        ConnectorDoors(
            gate, addresses, lambda _: POLICY, carry, lambda _, why: refused.append(why)
        ) as doors,
        doors.serving("shop", "shop"),
    ):
        doors.take_message(served(shop=[("a.corp.example", 80)]))
        await doors.refresh()
        clients = [
            await asyncio.open_connection("127.0.0.1", gate.ports[80])
            for _ in range(MAX_CONNECTIONS + 1)
        ]
        async with asyncio.timeout(5):
            while not refused:
                await asyncio.sleep(0.01)
        assert "256 connections open already" in refused[0]
        hold.set()
        for _, writer in clients:
            writer.close()


@asynccontextmanager
async def one_door(carry, refused):
    gate = Loopback()
    async with (
        ConnectorDoors(gate, ConnectedAddresses(), lambda _: POLICY, carry, refused) as doors,
        doors.serving("shop", "shop"),
    ):
        doors.take_message(served(shop=[("a.corp.example", 80)]))
        await doors.refresh()
        yield gate.ports[80]


def connected(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


async def test_a_build_that_connects_all_the_time_leaves_the_node_to_others(monkeypatch):
    monkeypatch.setattr("offload_builder.egress.connectors.doors.MAX_CONNECTIONS", 20)
    hold = asyncio.Event()
    refused: list[str] = []

    async def carry(arrival: Arrival) -> None:
        with arrival.connection:
            await hold.wait()

    async with one_door(carry, lambda _, why: refused.append(why)) as port:
        # All of them wait in the kernel's queue, which is never empty while somebody goes on.
        clients = connected(port, 80)
        await asyncio.sleep(0.1)
        assert len(refused) <= 1
        hold.set()
        for client in clients:
            client.close()


async def test_new_connections_of_a_place_have_a_rate(monkeypatch):
    monkeypatch.setattr("offload_builder.egress.connectors.doors.PER_SECOND", 40)
    taken: list[Arrival] = []

    async def carry(arrival: Arrival) -> None:
        taken.append(arrival)
        reset(arrival.connection)

    async with one_door(carry, print) as port:
        clients = connected(port, 80)
        await asyncio.sleep(0.3)
        # A burst of forty, and what has become due meanwhile.
        assert 40 <= len(taken) <= 60
        for client in clients:
            client.close()


async def test_a_place_whose_doors_cannot_be_opened_holds_up_no_other():
    class Refusing(Loopback):
        async def serve_connected(self, key, doors):
            if key == "shop":
                raise InternalError("nftables refused it")
            await super().serve_connected(key, doors)

    gate = Refusing()
    async with (
        ConnectorDoors(gate, ConnectedAddresses(), lambda _: POLICY, print, print) as doors,
        doors.serving("shop", "shop"),
        doors.serving("other", "other"),
    ):
        wanted = [("a.corp.example", 80)]
        doors.take_message(served(shop=wanted, other=wanted))
        with pytest.raises(InternalError, match="nftables refused it"):
            await doors.refresh()
        assert len(gate.served["other"]) == 1
        doors.take_message(served(shop=wanted))
        with pytest.raises(InternalError):
            await doors.refresh()
        assert gate.served["other"] == set()
        await asyncio.sleep(0.01)


def pair() -> tuple[socket.socket, Arrival]:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    client.setblocking(False)
    inner, _ = listener.accept()
    listener.close()
    arrival = Arrival(inner, "shop", "shop", "a.corp.example", 80, "198.19.0.1", "100.64.8.3")
    return client, arrival


class Stream:
    """What a connector sends, as gRPC gives it to a handler."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[CarryRequest | None] = asyncio.Queue()

    async def __aiter__(self):
        while (item := await self.queue.get()) is not None:
            yield item


async def test_both_directions_are_carried_and_end_by_themselves():
    loop, sent, refused = asyncio.get_running_loop(), [], []
    async with Tunnels(
        lambda m: sent.append(m) or True, lambda _, why: refused.append(why)
    ) as all_:
        client, arrival = pair()
        work = loop.create_task(all_.carry(arrival))
        await asyncio.sleep(0.01)
        call_id = sent[0].connection_wish.call_id
        assert len(call_id) == 32
        stream = Stream()
        carried = all_.claim(call_id).carry(stream)
        with pytest.raises(NotFoundError):
            all_.claim(call_id)
        await loop.sock_sendall(client, b"question")
        assert (await anext(carried)).data == b"question"
        client.shutdown(socket.SHUT_WR)
        assert (await anext(carried)).WhichOneof("message") == "ended"
        stream.queue.put_nowait(CarryRequest(data=b"answer"))
        stream.queue.put_nowait(CarryRequest(ended=Ended()))
        assert await anext(carried, None) is None
        await work
        assert await loop.sock_recv(client, 99) == b"answer"
        assert await loop.sock_recv(client, 99) == b""
        client.close()
    assert refused == []


async def test_a_stream_that_breaks_resets_the_build():
    loop, sent = asyncio.get_running_loop(), []
    async with Tunnels(lambda m: sent.append(m) or True, print) as all_:
        client, arrival = pair()
        work = loop.create_task(all_.carry(arrival))
        await asyncio.sleep(0.01)
        stream = Stream()
        carried = all_.claim(sent[0].connection_wish.call_id).carry(stream)
        stream.queue.put_nowait(CarryRequest(data=b"half of"))
        stream.queue.put_nowait(None)
        assert await anext(carried, None) is None
        await work
        with pytest.raises(ConnectionResetError):
            while await loop.sock_recv(client, 99):
                pass
        client.close()


async def test_a_piece_that_is_larger_than_agreed_is_not_kept_and_resets_the_build():
    loop, sent = asyncio.get_running_loop(), []
    async with Tunnels(lambda m: sent.append(m) or True, print) as all_:
        client, arrival = pair()
        work = loop.create_task(all_.carry(arrival))
        await asyncio.sleep(0.01)
        stream = Stream()
        carried = all_.claim(sent[0].connection_wish.call_id).carry(stream)
        stream.queue.put_nowait(CarryRequest(data=bytes(PIECE_BYTES + 1)))
        async with asyncio.timeout(5):
            # The build reads nothing: what is written for it would wait here.
            assert await anext(carried, None) is None
            await work
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(client, 99)
        client.close()


async def test_a_connector_that_takes_nothing_does_not_keep_a_connection_that_is_cut():
    loop, sent, full = asyncio.get_running_loop(), [], asyncio.Event()

    async def call(tunnel) -> None:
        async with aclosing(tunnel.carry(Stream())) as responses:
            async for _ in responses:
                full.set()
                # As a write does whose other side opens no window.
                await asyncio.Event().wait()

    async with Tunnels(lambda m: sent.append(m) or True, print) as all_:
        client, arrival = pair()
        work = loop.create_task(all_.carry(arrival))
        await asyncio.sleep(0.01)
        calling = loop.create_task(call(all_.claim(sent[0].connection_wish.call_id)))
        async with asyncio.timeout(5):
            await loop.sock_sendall(client, b"question")
            await full.wait()
            (tunnel,) = all_._open
            tunnel.cut()
            await asyncio.wait((calling, work))
        assert calling.cancelled()
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(client, 99)
        client.close()


async def test_a_burst_of_calls_waits_for_its_turn_at_the_gateway():
    loop, sent, refused = asyncio.get_running_loop(), [], []
    turns = [False, False, True]

    def send(message) -> bool:
        if taken := turns.pop(0):
            sent.append(message)
        return taken

    async with Tunnels(send, lambda _, why: refused.append(why)) as all_:
        client, arrival = pair()
        work = loop.create_task(all_.carry(arrival))
        async with asyncio.timeout(5):
            while not sent:
                await asyncio.sleep(0.01)
        call_id = sent[0].connection_wish.call_id
        all_.take_message(AttachResponse(call_refused=CallRefused(call_id=call_id, reason="no")))
        await work
        client.close()
    assert refused == ["no"]


async def test_a_call_that_is_refused_or_cannot_be_made_resets_the_build_and_is_told():
    loop, sent, refused = asyncio.get_running_loop(), [], []
    answers = [True, False]

    def send(message) -> bool:
        sent.append(message)
        return answers.pop(0) if answers else False

    async with Tunnels(send, lambda _, why: refused.append(why)) as all_:
        client, arrival = pair()
        work = loop.create_task(all_.carry(arrival))
        await asyncio.sleep(0.01)
        call_id = sent[0].connection_wish.call_id
        all_.take_message(
            AttachResponse(call_refused=CallRefused(call_id=call_id, reason="it is not there"))
        )
        await work
        second, arrival = pair()
        await all_.carry(arrival)
        assert refused == ["it is not there", "the gateway does not answer the node"]
        for one in (client, second):
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(one, 99)
            one.close()

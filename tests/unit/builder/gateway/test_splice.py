"""Two sockets that are made one in the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from pathlib import Path

import pytest

from offload_builder.gateway.splice import MAX_FREE_PIPES, PIPE_BYTES, Pipe, PipeStore, Splice

SECONDS = 10


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def unix_pair():
    return socket.socketpair()


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir())) - 1


@contextlib.asynccontextmanager
async def spliced(pair=tcp_pair):
    store, closed = PipeStore(), asyncio.Event()
    (client, left), (right, server) = pair(), pair()
    for end in (client, left, right, server):
        end.setblocking(False)
    splice = Splice(left, right, store, lambda _: closed.set())
    splice.start()
    try:
        yield client, server, store, closed
    finally:
        splice.close()
        client.close()
        server.close()
        store.close()


async def read_all(end):
    loop, pieces = asyncio.get_running_loop(), []
    while data := await loop.sock_recv(end, 1 << 16):
        pieces.append(data)
    return b"".join(pieces)


async def send_all(end, data, chance):
    loop, position = asyncio.get_running_loop(), 0
    while position < len(data):
        size = chance.choice((1, 100, 5_000, 1 << 18))
        await loop.sock_sendall(end, data[position : position + size])
        position += size
    end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
async def test_every_byte_goes_both_ways_and_the_end_follows(pair):
    chance = random.Random(1)
    up, down = chance.randbytes(5_000_000), chance.randbytes(3_000_000)
    async with spliced(pair) as (client, server, _store, closed), asyncio.timeout(SECONDS):
        async with asyncio.TaskGroup() as group:
            group.create_task(send_all(client, up, chance))
            group.create_task(send_all(server, down, chance))
            at_server = group.create_task(read_all(server))
            at_client = group.create_task(read_all(client))
        assert at_server.result() == up
        assert at_client.result() == down
        await closed.wait()


async def test_one_direction_goes_on_after_the_other_has_ended():
    loop = asyncio.get_running_loop()
    async with spliced() as (client, server, _store, closed), asyncio.timeout(SECONDS):
        client.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(server, 10) == b""
        await loop.sock_sendall(server, b"later")
        assert await loop.sock_recv(client, 10) == b"later"
        assert not closed.is_set()


async def test_who_reads_nothing_holds_the_sender_back():
    loop, sent = asyncio.get_running_loop(), 0
    async with spliced() as (client, server, _store, closed):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await loop.sock_sendall(client, bytes(1 << 16))
                    sent += 1 << 16
        # What the kernel keeps for four sockets, and one pipe.
        assert sent < (32 << 20) + PIPE_BYTES
        assert not closed.is_set()
        async with asyncio.timeout(SECONDS):
            client.shutdown(socket.SHUT_WR)
            assert len(await read_all(server)) >= sent


async def test_a_connection_that_breaks_ends_the_other():
    async with spliced() as (client, server, _store, closed), asyncio.timeout(SECONDS):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        await closed.wait()
        with contextlib.suppress(ConnectionError):
            assert await asyncio.get_running_loop().sock_recv(server, 10) == b""


async def test_pipes_are_held_only_while_bytes_are_on_their_way():
    loop = asyncio.get_running_loop()
    before = descriptors()
    async with spliced() as (client, server, store, _closed), asyncio.timeout(SECONDS):
        for _ in range(20):
            await loop.sock_sendall(client, b"ping")
            assert await loop.sock_recv(server, 10) == b"ping"
            await loop.sock_sendall(server, b"pong")
            assert await loop.sock_recv(client, 10) == b"pong"
        # Four sockets and one pipe, which is free.
        assert descriptors() == before + 6
        pipe = store.take()
        assert descriptors() == before + 6
        store.give(pipe)
    assert descriptors() == before


async def test_a_pipe_with_bytes_of_one_connection_never_serves_another():
    loop = asyncio.get_running_loop()
    async with spliced() as (client, server, store, closed):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                while True:
                    await loop.sock_sendall(client, b"x" * (1 << 16))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        server.close()
        async with asyncio.timeout(SECONDS):
            await closed.wait()
        pipe = store.take()
        with pytest.raises(BlockingIOError):
            os.read(pipe.out, 1)
        pipe.close()


def test_few_free_pipes_are_kept():
    before, store = descriptors(), PipeStore()
    for pipe in [Pipe() for _ in range(MAX_FREE_PIPES + 3)]:
        store.give(pipe)
    assert descriptors() == before + 2 * MAX_FREE_PIPES
    store.close()
    assert descriptors() == before

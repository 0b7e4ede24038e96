"""What a node's records of builds show, over a real connection."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from offload_builder.buildkit.client import BuildkitClient
from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.server import GrpcServer
from offload_builder.node.proxy.records import LISTEN_HISTORY, answers


class Daemon(asyncio.Protocol):
    """Tells of one build after the other, as long as somebody listens."""

    def __init__(self, told):
        self._told = told
        self._server = GrpcServer({LISTEN_HISTORY: self._listen}, lambda *_: None)
        self._http2 = Http2Connection(self._write, client=False, on_stream=self._server.accept)

    def connection_made(self, transport):
        self._transport = transport
        self._http2.start()

    def data_received(self, data):
        self._http2.feed(data)

    def connection_lost(self, exc):
        self._http2.lose("gone")

    async def _write(self, pieces):
        self._transport.write(b"".join(pieces))

    async def _listen(self, call):
        await call.receive_one()
        while (message := await self._told.get()) is not None:
            await call.send([message])


async def test_capabilities_of_later_builds_are_hidden_as_well(tmp_path):
    told = asyncio.Queue()
    socket = tmp_path / "d.sock"
    loop = asyncio.get_running_loop()
    daemons = []

    def made():
        daemons.append(Daemon(told))
        return daemons[-1]

    server = await loop.create_unix_server(made, str(socket))
    known = ["first-capability"]
    async with BuildkitClient(socket) as client:
        messages = answers(client, LISTEN_HISTORY, b"", lambda: known, dict)
        async with aclosing(messages) as stream:
            told.put_nowait(b"127.0.0.1/first-capability/cache")
            assert await anext(stream) == b"127.0.0.1/****************/cache"
            known.append("next-capability")
            told.put_nowait(b"127.0.0.1/next-capability/cache")
            assert await anext(stream) == b"127.0.0.1/***************/cache"
            told.put_nowait(None)
            assert [message async for message in stream] == []
    server.close()
    for daemon in daemons:
        await daemon._server.close()
        await daemon._http2.close(0.1)
        daemon._transport.abort()
    await asyncio.sleep(0)

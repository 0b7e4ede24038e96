"""Which containers of a session get ports of this machine."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from offload_client.sessions.containers import KnownContainer, KnownContainers
from offload_client.sessions.localports import LocalPorts
from offload_client.sessions.portspecs import Binding
from offload_client.sessions.tunnel import Tunnel
from offload_client.sessions.watching import Watching
from offload_core.aio import TaskSet, stop
from offload_core.enginecalls import UnixConnection
from offload_core.enginehttp import RequestReader, response
from tests.fixtures.ports import free_port

OWN, FOREIGN = "a" * 64, "b" * 64
LOG = logging.getLogger("test")
PATIENCE = 20.0


class Running:
    """News of a session with a container that runs."""

    class activity:
        running_containers = 1


class Session:
    """A tunnel to an engine that says what a test wants."""

    paused = False
    news = Running()

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.listed: list[Any] = []
        self.lists = 0
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.before_list = asyncio.Event()
        self.before_list.set()
        self._serving = TaskSet()
        self.known = KnownContainers(path.with_name("containers.json"))
        self.ports = LocalPorts(cast("Tunnel", self), LOG)
        self.watching = Watching(cast("Tunnel", self), self.known, self.ports, LOG)

    def on_change(self, _listener: Any) -> None:
        """Nothing changes."""

    async def engine(self, *, wake: bool = True) -> UnixConnection:
        assert not wake
        return await UnixConnection.open(self._path)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await RequestReader(partial(reader.read, 65536)).head()) is not None:
                if head.path == "/events":
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                    while True:
                        line = json.dumps(await self.events.get()).encode() + b"\n"
                        writer.write(b"%x\r\n%s\r\n" % (len(line), line))
                        await writer.drain()
                elif head.path == "/containers/json":
                    self.lists += 1
                    listed = json.dumps(self.listed).encode()
                    await self.before_list.wait()
                    writer.write(response(200, listed))
                else:
                    places = {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40000"}]}
                    told = {"State": {"Running": True}, "NetworkSettings": {"Ports": places}}
                    writer.write(response(200, json.dumps(told).encode()))
                await writer.drain()
        finally:
            writer.close()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.start(self.serve(reader, writer), name="serve")

    def create(self, container_id: str) -> int:
        """Create a container with a port here; return the port."""
        port = free_port()
        self.known.add(KnownContainer(container_id, "web", (Binding("80/tcp", "", port),)))
        return port

    def tell(self, action: str, container_id: str, **attributes: str) -> None:
        actor = {"ID": container_id, "Attributes": attributes}
        self.events.put_nowait({"Action": action, "Actor": actor})

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.01)

    async def aclose(self) -> None:
        await self.ports.aclose()
        await self._serving.close()


@asynccontextmanager
async def session_of(directory: Path) -> AsyncIterator[Session]:
    session = Session(directory / "s")
    server = await asyncio.start_unix_server(session.accept, path=str(directory / "s"))
    task = asyncio.ensure_future(session.watching.run())
    try:
        await session.until(lambda: session.lists)
        yield session
    finally:
        await stop(task)
        server.close()
        await session.aclose()


async def test_only_what_was_created_here_gets_ports(tmp_path: Path) -> None:
    async with session_of(tmp_path) as session:
        port = session.create(OWN)
        ports = [{"PrivatePort": 80, "PublicPort": 40000, "Type": "tcp"}]
        session.listed = [{"Id": FOREIGN, "State": "running", "Ports": ports}]
        session.tell("start", FOREIGN)
        session.tell("start", OWN)
        await session.until(lambda: session.ports.listing())
        assert {one["port"] for one in session.ports.listing()} == {port}
        session.tell("destroy", OWN)
        await session.until(lambda: not session.ports.listing())
        assert not session.known.ids()


async def test_nonsense_of_an_engine_does_not_end_the_watching(tmp_path: Path) -> None:
    async with session_of(tmp_path) as session:
        session.create(OWN)
        for nonsense in (None, 1, "start", [], {"Actor": 1}, {"Actor": {"ID": [OWN]}}):
            session.events.put_nowait(nonsense)
        session.events.put_nowait({"Action": "rename", "Actor": {"ID": OWN, "Attributes": 1}})
        session.tell("rename", OWN, name="x" * 100_000)
        session.tell("rename", OWN, name="/new")
        session.tell("start", OWN)
        await session.until(lambda: session.ports.has(OWN))
        known = session.known.by_id(OWN)
        assert known is not None
        assert known.name == "new"


async def test_a_list_of_before_its_start_does_not_close_a_container(tmp_path: Path) -> None:
    async with session_of(tmp_path) as session:
        session.create(OWN)
        known = session.known.by_id(OWN)
        assert known is not None
        session.listed = [{"Id": OWN, "State": "created"}]
        session.before_list.clear()
        before = session.lists
        with session.ports.starting(OWN):
            session.ports.open(OWN, known.name, known.bindings)
            # Something that breaks the stream: containers are compared again.
            session.events.put_nowait("x" * (2 << 20))
            await session.until(lambda: session.lists > before)
        session.before_list.set()
        session.tell("start", OWN)
        session.create(FOREIGN)
        session.tell("start", FOREIGN)
        await session.until(lambda: session.ports.has(FOREIGN))
        assert session.ports.has(OWN)


async def test_a_list_that_is_none_does_not_end_the_watching(tmp_path: Path) -> None:
    async with session_of(tmp_path) as session:
        session.create(OWN)
        session.listed = [1]
        before = session.lists
        session.events.put_nowait("x" * (2 << 20))
        await session.until(lambda: session.lists > before)
        session.listed = [{"Id": OWN, "State": "running"}]
        await session.until(lambda: session.ports.has(OWN))

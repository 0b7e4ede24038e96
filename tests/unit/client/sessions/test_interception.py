"""What the proxy of docker's API does about ports and directories of this machine."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from offload_client.sessions.bindmounts import BindMounts
from offload_client.sessions.containers import KnownContainers
from offload_client.sessions.interception import Interception
from offload_client.sessions.localports import LocalPorts
from offload_client.sessions.portspecs import Binding
from offload_client.sessions.tunnel import Tunnel
from offload_core.aio import TaskSet
from offload_core.enginecalls import UnixConnection
from offload_core.enginehttp import RequestReader, response
from offload_core.errors import ConfigError, OffloadError, PortTakenError

ID = "f" * 64
LOG = logging.getLogger("test")


class Mounts:
    """Says what it was asked for, in order."""

    def __init__(self, happened: list[str]) -> None:
        self._happened = happened

    async def prepare(self, source: str, *, read_only: bool) -> str:
        if "secret" in source:
            raise ConfigError("the directory is too large")
        self._happened.append(f"prepare {source} {read_only}")
        return f"/offload/binds{source}"

    async def before_start(self) -> None:
        self._happened.append("before start")

    async def after_exit(self) -> None:
        self._happened.append("after exit")

    def describe(self) -> list[dict[str, Any]]:
        return []

    async def aclose(self) -> None:
        pass


class EngineTunnel:
    """Leads to a small engine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def engine(self, *, wake: bool = True) -> UnixConnection:
        return await UnixConnection.open(self._path)


class Proxied:
    """An interception with an engine that says yes to everything."""

    def __init__(self, directory: Path) -> None:
        self.happened: list[str] = []
        self.bodies: list[Any] = []
        self.ids: list[str] = []
        self.wait_answer = b'{"StatusCode": 0}'
        self.known = KnownContainers(directory / "containers.json")
        tunnel = cast("Tunnel", EngineTunnel(directory / "s"))
        self.ports = LocalPorts(tunnel, LOG)
        mounts = cast("BindMounts", Mounts(self.happened))
        self.interception = Interception(tunnel, self.known, self.ports, mounts, LOG)
        self._serving = TaskSet()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = RequestReader(partial(reader.read, 65536))
        while (head := await requests.head()) is not None:
            body = await requests.read_body(1 << 20)
            self.happened.append(head.path.rpartition("/")[2])
            if head.path.endswith("/create"):
                self.bodies.append(json.loads(body))
                told = self.ids.pop(0) if self.ids else ID
                writer.write(response(201, json.dumps({"Id": told, "Warnings": []}).encode()))
            elif head.path.endswith("/wait"):
                writer.write(response(200, self.wait_answer))
            else:
                writer.write(response(204, b""))
            await writer.drain()
        writer.close()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.start(self.serve(reader, writer), name="serve")

    async def ask(self, target: str, body: Any = None) -> bytes:
        """Return the answer to a request that is intercepted."""
        sent = json.dumps(body).encode() if body is not None else b""
        text = f"POST /v1.47{target} HTTP/1.1\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
        waiting = [text + sent]

        async def receive() -> bytes:
            return waiting.pop() if waiting else b""

        requests = RequestReader(receive)
        head = await requests.head()
        assert head is not None
        handler = self.interception.find(head)
        assert handler is not None, target
        answer = bytearray()

        async def send(data: bytes) -> None:
            if b"StatusCode" in data:
                self.happened.append("answer")
            answer.extend(data)

        await handler(head, requests, send)
        return bytes(answer)

    async def passes(self, target: str, method: str = "POST") -> bool:
        """Return whether a request goes to the engine as it is."""
        waiting = [f"{method} {target} HTTP/1.1\r\n\r\n".encode()]

        async def receive() -> bytes:
            return waiting.pop()

        head = await RequestReader(receive).head()
        assert head is not None
        return self.interception.find(head) is None

    async def aclose(self) -> None:
        await self.ports.aclose()
        await self._serving.drain(5)
        await self._serving.close()


@asynccontextmanager
async def proxied(directory: Path) -> AsyncIterator[Proxied]:
    made = Proxied(directory)
    server = await asyncio.start_unix_server(made.accept, path=str(directory / "s"))
    try:
        yield made
    finally:
        server.close()
        await made.aclose()


def host_config(**values: Any) -> dict[str, Any]:
    return {"Image": "box", "HostConfig": values}


async def test_a_container_with_nothing_of_this_machine_is_left_alone(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        wanted = host_config(Binds=["volume:/a"], PortBindings={})
        answer = await proxy.ask("/containers/create?name=plain", wanted)
        assert answer.startswith(b"HTTP/1.1 201 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["Id"] == ID
        assert proxy.bodies == [wanted]
        assert await proxy.passes(f"/containers/{ID}/start")
        assert await proxy.passes("/containers/plain/wait")
        assert await proxy.passes("/containers/create", "GET")


async def test_directories_are_there_before_and_back_after(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    made = tmp_path / "new" / "deep"
    async with proxied(tmp_path) as proxy:
        await proxy.ask(
            "/containers/create?name=web",
            host_config(
                Binds=[
                    f"{source}:/src:ro,z",
                    f"{made}:/new",
                    "data:/data",
                    "/var/run/docker.sock:/var/run/docker.sock",
                ],
                Mounts=[
                    {"Type": "bind", "Source": str(source), "Target": "/b", "ReadOnly": False},
                    {"Type": "volume", "Source": "data", "Target": "/c"},
                ],
            ),
        )
        host = proxy.bodies[0]["HostConfig"]
        assert host["Binds"] == [
            f"/offload/binds{source}:/src:ro,z",
            f"/offload/binds{made}:/new",
            "data:/data",
            "/var/run/docker.sock:/var/run/docker.sock",
        ]
        assert [mount["Source"] for mount in host["Mounts"]] == [
            f"/offload/binds{source}",
            "data",
        ]
        assert made.is_dir()
        await proxy.ask("/containers/web/start")
        await proxy.ask(f"/containers/{ID[:12]}/wait?condition=removed")
        assert proxy.happened == [
            f"prepare {source} True",
            f"prepare {made} False",
            f"prepare {source} False",
            "create",
            "before start",
            "start",
            "wait",
            "after exit",
            "answer",
        ]


async def test_a_mount_without_its_source_is_refused_as_an_engine_does(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        mount = {"Type": "bind", "Source": str(tmp_path / "none"), "Target": "/b"}
        with pytest.raises(OffloadError, match="bind source path does not exist"):
            await proxy.ask("/containers/create", host_config(Mounts=[mount]))
        secret = tmp_path / "secret"
        with pytest.raises(OffloadError, match="too large"):
            await proxy.ask("/containers/create", host_config(Binds=[f"{secret}:/a"]))
        assert proxy.bodies == []


async def test_chosen_ports_are_written_and_kept_for_the_start(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        published = {
            "80/tcp": [{"HostIp": "", "HostPort": ""}, {"HostIp": "::1", "HostPort": "0"}],
            "53/udp": [{"HostIp": "127.0.0.1", "HostPort": "20000-60000"}],
            "9/sctp": [{"HostIp": "", "HostPort": "9"}],
            "81/tcp": [],
        }
        await proxy.ask("/containers/create?name=web", host_config(PortBindings=published))
        written = proxy.bodies[0]["HostConfig"]["PortBindings"]
        assert [place["HostIp"] for place in written["80/tcp"]] == ["", "127.0.0.1"]
        assert written["53/udp"][0]["HostIp"] == "127.0.0.1"
        assert written["9/sctp"] == published["9/sctp"]
        assert written["81/tcp"] == []
        ports = {int(place["HostPort"]) for key in ("80/tcp", "53/udp") for place in written[key]}
        assert len(ports) == 3
        assert not proxy.ports.listing()
        # Another helper takes over.
        assert KnownContainers(tmp_path / "containers.json").find("web") == proxy.known.find(ID)
        assert (await proxy.ask("/containers/web/start")).startswith(b"HTTP/1.1 204 ")
        assert {one["port"] for one in proxy.ports.listing()} == ports
        with socket.create_connection(("127.0.0.1", int(written["80/tcp"][0]["HostPort"]))):
            pass


async def test_a_port_that_is_taken_leaves_the_container_as_it_is(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            published = {"80/tcp": [{"HostPort": str(port)}]}
            await proxy.ask("/containers/create?name=web", host_config(PortBindings=published))
            answer = await proxy.ask(f"/containers/{ID}/start")
        assert answer.startswith(b"HTTP/1.1 500 ")
        told = f"failed to bind host port 0.0.0.0:{port}/tcp: address already in use"
        assert told.encode() in answer
        assert proxy.happened == ["create"]
        assert not proxy.ports.listing()


async def test_a_port_of_another_container_is_told_apart(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        taken = Binding("80/tcp", "", port)
        proxy.ports.open("a" * 64, "first", [taken])
        with pytest.raises(PortTakenError, match=f"0.0.0.0:{port} failed: port is already alloc"):
            proxy.ports.open("b" * 64, "second", [taken])


async def test_a_container_that_should_go_at_its_end_goes_when_its_port_is_taken(
    tmp_path: Path,
) -> None:
    async with proxied(tmp_path) as proxy:
        with socket.create_server(("127.0.0.1", 0)) as other:
            published = {"80/tcp": [{"HostPort": str(other.getsockname()[1])}]}
            config = host_config(PortBindings=published, AutoRemove=True)
            await proxy.ask("/containers/create?name=web", config)
            answer = await proxy.ask(f"/containers/{ID}/start")
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert proxy.happened == ["create", ID]


async def test_a_name_belongs_to_whoever_has_it_now(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        published = {"80/tcp": [{"HostPort": ""}]}
        await proxy.ask("/containers/create?name=web", host_config(PortBindings=published))
        assert not await proxy.passes("/containers/web/start")
        await proxy.ask("/containers/create?name=web", host_config())
        assert await proxy.passes("/containers/web/start")


async def test_containers_that_are_created_together_get_ports_of_their_own(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        published = {"80/tcp": [{"HostPort": "21000-21040"}]}
        proxy.ids = [f"{number:064x}" for number in range(3)]
        await asyncio.gather(
            *(
                proxy.ask("/containers/create", host_config(PortBindings=published))
                for _ in range(3)
            )
        )
        ports = [
            body["HostConfig"]["PortBindings"]["80/tcp"][0]["HostPort"] for body in proxy.bodies
        ]
        assert len(set(ports)) == 3


@pytest.mark.parametrize(
    "wanted",
    [
        {"HostConfig": ["Binds"]},
        ["HostConfig"],
        {"HostConfig": {"PortBindings": {"80/tcp": "80"}}},
        {"HostConfig": {"PortBindings": {"80/tcp": ["80"]}}},
        {"HostConfig": {"Binds": "a:b"}},
        {"HostConfig": {"Mounts": ["a"]}},
    ],
)
async def test_what_is_not_understood_is_left_to_the_engine(tmp_path: Path, wanted: Any) -> None:
    async with proxied(tmp_path) as proxy:
        await proxy.ask("/containers/create", wanted)
        assert proxy.bodies == [wanted]


async def test_an_engine_that_talks_without_end_is_not_listened_to(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        await proxy.ask("/containers/create?name=web", host_config(Binds=[f"{tmp_path}:/a"]))
        proxy.wait_answer = b" " * (9 << 20)
        with pytest.raises(OffloadError, match="too much"):
            await proxy.ask("/containers/web/wait")


async def test_an_engine_cannot_take_a_container_for_another_one(tmp_path: Path) -> None:
    async with proxied(tmp_path) as proxy:
        published = {"80/tcp": [{"HostPort": ""}]}
        await proxy.ask("/containers/create?name=web", host_config(PortBindings=published))
        for told in (ID, "", "../../secrets", ID.upper()):
            proxy.ids = [told]
            with pytest.raises(OffloadError, match="which container"):
                await proxy.ask("/containers/create", host_config(PortBindings=published))
        assert proxy.known.ids() == {ID}

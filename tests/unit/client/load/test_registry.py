"""The registry that engines pull from, spoken to over plain sockets."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import pytest

from offload_client.load.image import read_root
from offload_client.load.progress import LoadMeter
from offload_client.load.registry import LoopbackRegistry
from offload_core.errors import NodeLostError
from tests.fixtures.ociimages import BuiltImage, MemorySource, noise_layer

_SIZE = 700_000


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Setup(NamedTuple):
    registry: LoopbackRegistry
    source: MemorySource
    image: BuiltImage

    @property
    def name(self) -> str:
        return self.registry.repository.partition("/")[2]

    @property
    def port(self) -> int:
        return int(self.registry.repository.partition(":")[2].partition("/")[0])

    @property
    def layer_path(self) -> str:
        return f"/v2/{self.name}/blobs/{self.image.layers[0].digest}"

    async def ask(
        self, path: str, method: str = "GET", password: str | None = None, **headers: str
    ) -> Answer:
        async with connection(self) as (reader, writer):
            return await ask_on(self, reader, writer, path, method, password, headers)

    async def meet(self) -> str:
        """Read the manifests like an engine; return the image manifest's path."""
        index = await self.ask(f"/v2/{self.name}/manifests/{self.image.digest}")
        manifest = json.loads(index.body)["manifests"][0]["digest"]
        path = f"/v2/{self.name}/manifests/{manifest}"
        assert (await self.ask(path)).status == 200
        return path


async def ask_on(
    setup: Setup,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    method: str = "GET",
    password: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    login = setup.registry.login
    text = f"{login.username}:{login.password if password is None else password}"
    lines = [f"{method} {path} HTTP/1.1", "Host: x"]
    if password != "":
        lines.append(f"Authorization: Basic {base64.b64encode(text.encode()).decode()}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    fields = {
        name.lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head[1:])
        if name
    }
    length = 0 if method == "HEAD" else int(fields["content-length"])
    return Answer(int(head[0].split()[1]), fields, await reader.readexactly(length))


@asynccontextmanager
async def connection(
    setup: Setup,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    source = MemorySource()
    image = source.add_image([noise_layer("a", _SIZE, compression="none")])
    meter = LoadMeter(lambda _: None)
    root = await read_root(source, image.digest)
    async with LoopbackRegistry(source, root, meter) as registry:
        yield Setup(registry, source, image)


async def test_image_can_be_read_down_to_its_layers(setup: Setup) -> None:
    assert (await setup.ask("/v2/")).status == 200
    index = await setup.ask(f"/v2/{setup.name}/manifests/{setup.image.digest}?ns=x")
    assert index.headers["content-type"] == "application/vnd.oci.image.index.v1+json"
    assert index.headers["docker-content-digest"] == setup.image.digest
    await setup.meet()
    blob = await setup.ask(setup.layer_path)
    assert (blob.status, blob.body) == (200, setup.image.layers[0].blob)
    assert setup.registry.served == {setup.image.layers[0].digest}


async def test_head_tells_the_size_and_takes_nothing(setup: Setup) -> None:
    path = await setup.meet()
    assert int((await setup.ask(path, "HEAD")).headers["content-length"]) > 0
    head = await setup.ask(setup.layer_path, "HEAD")
    assert head.headers["content-length"] == str(len(setup.image.layers[0].blob))
    assert setup.source.bytes_taken == 0
    assert setup.registry.served == set()


async def test_range_brings_the_rest(setup: Setup) -> None:
    await setup.meet()
    blob = setup.image.layers[0].blob
    part = await setup.ask(setup.layer_path, Range="bytes=600000-")
    assert (part.status, part.body) == (206, blob[600_000:])
    assert part.headers["content-range"] == f"bytes 600000-{len(blob) - 1}/{len(blob)}"
    assert setup.source.bytes_taken == len(blob) - 600_000


async def test_range_that_is_not_understood_brings_everything(setup: Setup) -> None:
    await setup.meet()
    assert (await setup.ask(setup.layer_path, Range="bytes=5-9")).status == 200
    assert (await setup.ask(setup.layer_path, Range="lines=1-")).status == 200


async def test_range_behind_the_end_is_refused(setup: Setup) -> None:
    await setup.meet()
    assert (await setup.ask(setup.layer_path, Range="bytes=99999999-")).status == 400


@pytest.mark.parametrize("password", ["", "wrong"])
async def test_nobody_else_gets_in(setup: Setup, password: str) -> None:
    await setup.meet()
    for path in ("/v2/", setup.layer_path, f"/v2/{setup.name}/manifests/{setup.image.digest}"):
        answer = await setup.ask(path, password=password)
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
    assert setup.source.bytes_taken == 0


async def test_only_the_images_own_content_is_served(setup: Setup) -> None:
    foreign = setup.source.add_blob(b"another image's layer")
    other = setup.source.add_image([noise_layer("b", 10)])
    await setup.meet()
    digest = setup.image.digest
    for path in (
        f"/v2/{setup.name}/blobs/{foreign}",
        f"/v2/{setup.name}/manifests/{other.digest}",
        f"/v2/{setup.name}/referrers/{digest}",
        f"/v2/{setup.name}/manifests/{digest.replace(':', '-')}",
        f"/v2/other/manifests/{digest}",
        f"/v2/{setup.name}/blobs/sha256:" + "./" * 32,
        "/",
    ):
        assert (await setup.ask(path)).status == 404


async def test_writing_is_refused(setup: Setup) -> None:
    answer = await setup.ask(f"/v2/{setup.name}/blobs/uploads/", "POST")
    assert answer.status == 405


async def test_connection_is_used_again(setup: Setup) -> None:
    async with connection(setup) as (reader, writer):
        for _ in range(3):
            assert (await ask_on(setup, reader, writer, "/v2/")).status == 200


async def test_tls_probe_is_answered_in_http(setup: Setup) -> None:
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    async with connection(setup) as (reader, writer):
        writer.write(hello.read())
        answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert setup.registry.contacted.is_set()


@pytest.mark.parametrize("rubbish", [b"hello\r\n\r\n", b"GET / FTP/1\r\n\r\n", b"x" * 70_000])
async def test_rubbish_is_answered_with_400(setup: Setup, rubbish: bytes) -> None:
    async with connection(setup) as (reader, writer):
        writer.write(rubbish)
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 400 ")


async def test_source_that_fails_breaks_the_connection_and_is_remembered(setup: Setup) -> None:
    await setup.meet()
    digest = setup.image.layers[0].digest
    setup.source.broken[digest] = NodeLostError("the node is gone")
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await setup.ask(setup.layer_path)
    assert isinstance(setup.registry.failure, NodeLostError)


async def test_damaged_blob_never_becomes_whole(setup: Setup) -> None:
    await setup.meet()
    setup.source.damage(setup.image.layers[0].digest)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await setup.ask(setup.layer_path)
    assert "damaged" in str(setup.registry.failure)


async def test_closing_ends_open_connections(setup: Setup) -> None:
    async with connection(setup) as (reader, writer):
        assert (await ask_on(setup, reader, writer, "/v2/")).status == 200
        await setup.registry.close()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1), 5)


async def test_password_is_masked(setup: Setup) -> None:
    assert setup.registry.login.password not in repr(setup.registry.login)

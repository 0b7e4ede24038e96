"""Clients that are slow, that die, and that send what is no request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from offload_cache.registry import Registry, RegistryServer, UploadLimits, connections, links
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError
from tests.fixtures.cachecontent import cache_manifest, manifest, step_config
from tests.fixtures.registryclient import RegistryBench

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_cache.nodestore import NodeStore
    from tests.fixtures.registryclient import RegistryClient

QUICK = UploadLimits(
    blob_bytes=8 << 20, idle_seconds=0.4, window_seconds=0.4, window_bytes=1000, total_seconds=1.6
)


@asynccontextmanager
async def connected(bench: RegistryBench) -> AsyncIterator[Raw]:
    host, port = bench.server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


class Raw:
    """A connection for what no HTTP client sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes | str) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, str, bytes]:
        """Return status, head and body of the next answer."""
        async with asyncio.timeout(5):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            length = [line for line in head.lower().split("\r\n") if "content-length:" in line]
            body = await self.reader.readexactly(int(length[0].split(":")[1]) if length else 0)
        return int(head.split()[1]), head, body

    async def ended(self, seconds: float = 5) -> bool:
        """Wait until the server closes the connection."""
        try:
            async with asyncio.timeout(seconds):
                while await self.reader.read(1 << 16):
                    pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True


@pytest.fixture
async def quick(node: NodeStore) -> AsyncIterator[RegistryBench]:
    registry = Registry()
    async with RegistryServer(registry, node.statistics, limits=QUICK) as server:
        bench = RegistryBench(node, registry, server)
        async with bench.http:
            yield bench


async def opened(client: RegistryClient) -> str:
    _, headers, _ = await client.call("POST", "image/blobs/uploads/")
    return str(headers["Location"])


async def test_an_upload_that_its_client_left_ends(quick: RegistryBench) -> None:
    client = await quick.client()
    uploads = [await opened(client) for _ in range(64)]
    await client.call("PATCH", client.root + uploads[0], data=b"abc")
    assert (await client.call("POST", "image/blobs/uploads/"))[0] == 429
    async with asyncio.timeout(5):
        while not quick.no_ingests():
            await asyncio.sleep(0.02)
    assert (await client.call("GET", client.root + uploads[0]))[0] == 404
    assert (await client.call("POST", "image/blobs/uploads/"))[0] == 202


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("trickle", [True, False])
async def test_a_slow_upload_ends_and_disturbs_nobody(
    quick: RegistryBench, method: str, trickle: bool
) -> None:
    client = await quick.client()
    upload = await opened(client)
    async with connected(quick) as raw:
        began = time.monotonic()
        await raw.send(
            f"{method} {upload}?digest={sha256_digest(b'')} HTTP/1.1\r\nHost: x\r\n"
            "Content-Length: 100000\r\n\r\n"
        )
        answer = asyncio.ensure_future(raw.answer())
        while not answer.done() and time.monotonic() - began < 5:
            if trickle:
                await raw.send(b"x")
            # Meanwhile others work as ever.
            await client.push("image", os.urandom(1000))
            await asyncio.sleep(0.02)
        status, _, body = await answer
    assert (status, json.loads(body)["errors"][0]["code"]) == (408, "BLOB_UPLOAD_INVALID")
    assert time.monotonic() - began < 3
    assert (await client.call("GET", client.root + upload))[0] == 404
    assert quick.no_ingests()


async def test_a_steady_upload_outlives_the_idle_time(quick: RegistryBench) -> None:
    client = await quick.client()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 2000
            await asyncio.sleep(0.05)

    upload = await opened(client)
    digest = sha256_digest(b"x" * 40_000)
    status, _, _ = await client.call("PUT", f"{client.root}{upload}?digest={digest}", data=body())
    assert status == 201


async def test_an_upload_that_never_ends_is_ended(quick: RegistryBench) -> None:
    client = await quick.client()
    upload = client.root + await opened(client)
    statuses = set()
    async with asyncio.timeout(10):
        while 404 not in statuses:
            statuses.add((await client.call("PATCH", upload, data=b"abc"))[0])
            await asyncio.sleep(0.02)
    assert statuses == {202, 404}
    assert quick.no_ingests()


async def test_a_broken_chunk_is_continued_where_it_broke(
    bench: RegistryBench, client: RegistryClient
) -> None:
    data = os.urandom(5 << 20)
    upload = await opened(client)
    async with connected(bench) as raw:
        await raw.send(f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n")
        await raw.send(data[: 3 << 20])
        await asyncio.sleep(0.2)
    async with asyncio.timeout(5):
        while True:
            _, headers, _ = await client.call("GET", client.root + upload)
            received = int(headers["Range"].removeprefix("0-")) + 1
            status, _, _ = await client.call(
                "PATCH", client.root + upload, data=data[received:],
                headers={"Content-Range": f"{received}-{len(data) - 1}"},
            )  # fmt: skip
            if status == 202:  # before that the server had not heard that the client is gone
                break
            await asyncio.sleep(0.02)
    assert received > 1 << 20
    digest = sha256_digest(data)
    assert (await client.call("PUT", f"{client.root}{upload}?digest={digest}"))[0] == 201


async def test_two_requests_do_not_write_one_upload_at_a_time(
    bench: RegistryBench, client: RegistryClient
) -> None:
    upload = await opened(client)
    async with connected(bench) as raw:
        await raw.send(f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nabc")
        await asyncio.sleep(0.1)
        status, _, _ = await client.call("PATCH", client.root + upload, data=b"xyz")
        assert status == 416
        await raw.send(b"def")
        assert (await raw.answer())[0] == 202
    digest = sha256_digest(b"abcdef")
    assert (await client.call("PUT", f"{client.root}{upload}?digest={digest}"))[0] == 201


async def test_a_compressed_upload_is_kept_as_it_came(client: RegistryClient) -> None:
    data = b"\x1f\x8b no gzip at all"
    status, _, _ = await client.call(
        "POST", f"image/blobs/uploads/?digest={sha256_digest(data)}", data=data,
        headers={"Content-Encoding": "gzip"},
    )  # fmt: skip
    assert status == 201


@pytest.mark.parametrize(
    "request_head",
    [
        "POST {path} HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n",
        "GET {path}\0 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET {path} HTTP/9.9\r\nHost: x\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: x\r\nA\0b: c\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: x\r\nLong: " + "a" * 20_000 + "\r\n\r\n",
        "GET {path} HTTP/1.1\r\nHost: x\r\n" + "A: b\r\n" * 1000 + "\r\n",
        "GET {path}" + "a" * 20_000 + " HTTP/1.1\r\nHost: x\r\n\r\n",
        "no request at all\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_in_json_and_the_connection_ends(
    bench: RegistryBench, client: RegistryClient, request_head: str
) -> None:
    path = f"/v2/{client.capability}/image/blobs/uploads/"
    async with connected(bench) as raw:
        smuggled = "0\r\n\r\nGET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
        await raw.send(request_head.replace("{path}", path) + smuggled)
        status, head, body = await raw.answer()
        assert status == 400
        assert "application/json" in head
        [error] = json.loads(body)["errors"]
        assert (error["code"], client.capability in str(error)) == ("UNSUPPORTED", False)
        assert await raw.ended()
    assert bench.registry.state(client.capability).uploads == {}


@pytest.mark.parametrize(
    "path",
    [
        "/v2/{c}/image/../cache/blobs/{d}",
        "/v2/{c}/image/%2e%2e/cache/blobs/{d}",
        "/v2//{c}/image/blobs/{d}",
        "/v2/{c}//image/blobs/{d}",
        "/v2/{c}/image/blobs//{d}",
        "/v2/{c}/image%2fblobs/{d}",
        "/v2/{c}/image/blobs/{d}%00",
        "/v2/{c}/image/blobs/{d}/",
        "/v2/{c}/image/blobs/%2e%2e%2f%2e%2e%2fboot",
        "/v2/{c}/image/manifests/..%2f..%2fboot",
        "/v2/{c}/image/manifests/" + "a" * 4000,
        "/v2/{c}\\image\\blobs\\{d}",
        "http://elsewhere/v2/{c}/image/x",
        "/V2/{c}/image/blobs/{d}",
        "*",
    ],
)
async def test_path_tricks_of_raw_clients_reach_nothing(
    bench: RegistryBench, client: RegistryClient, path: str
) -> None:
    digest = await client.push("image", b"data")
    target = path.replace("{c}", client.capability).replace("{d}", digest)
    for method in ("GET", "DELETE", "PUT"):
        async with connected(bench) as raw:
            await raw.send(f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            status, _, body = await raw.answer()
        assert status in {400, 404, 405}
        assert json.loads(body)["errors"]
    assert (await client.call("GET", f"image/blobs/{digest}"))[2] == b"data"


async def test_connections_are_bounded_and_a_head_that_never_ends_is_dropped(
    bench: RegistryBench, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(connections, "_IDLE_SECONDS", 0.3)
    # Pulled over a connection of its own before, so that this one is among the three.
    assert (await client.call("GET", f"{client.root}/v2/"))[0] == 200
    async with connected(bench) as one, connected(bench) as two, connected(bench) as three:
        await one.send("GET /v2/ HTTP/1.1\r\nHost:")
        await two.send("")
        assert await three.ended(2)
        # Somebody who trickles a head does not keep the connection.
        assert await two.ended(2)
        for _ in range(20):
            await one.send("x")
            await asyncio.sleep(0.05)
            if one.reader.at_eof():
                break
        assert one.reader.at_eof()
    assert (await client.call("GET", f"{client.root}/v2/"))[0] == 200


async def test_connections_without_a_capability_do_not_keep_builds_out(
    bench: RegistryBench, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 20)
    monkeypatch.setattr(connections, "MAX_STRANGERS", 5, raising=False)
    digest = await client.push("image", b"data")
    async with contextlib.AsyncExitStack() as stack:
        build = await stack.enter_async_context(connected(bench))
        path = f"image/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n"
        wanted = f"GET /v2/{client.capability}/{path}"
        await build.send(wanted)
        assert (await build.answer())[0] == 200
        flood = [await stack.enter_async_context(connected(bench)) for _ in range(40)]
        # One more than they may be, so the first one has made room.
        assert await flood[0].ended(2)
        late = await stack.enter_async_context(connected(bench))
        for connection in (build, late):
            await connection.send(wanted)
            assert (await connection.answer())[::2] == (200, b"data")
        # Guessing does not make a friend of anybody.
        for guess in flood[-3:]:
            await guess.send(f"GET /v2/{'0' * 48}/{path}")
            assert (await guess.answer())[0] == 404
        more = [await stack.enter_async_context(connected(bench)) for _ in range(5)]
        assert all([await guess.ended(2) for guess in flood[-3:]])
        assert not await more[-1].ended(0.1)
        await build.send(wanted)
        assert (await build.answer())[::2] == (200, b"data")


async def test_a_client_that_does_not_read_its_blob_loses_its_connection(
    bench: RegistryBench, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_cache.registry.sending._SLICE_SECONDS", 0.3)
    store = (await bench.node.project("p")).store
    data = bytes(64 << 20)
    digest = await store.put_blob(data)
    async with connected(bench) as raw:
        path = f"/v2/{client.capability}/image/blobs/{digest}"
        await raw.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.8)
        assert await raw.ended()
    assert bench.node.statistics.blob_hits == 0
    assert (await client.call("GET", f"image/blobs/{digest}"))[2] == data


async def test_names_are_bounded(client: RegistryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_TAGS", 3)
    monkeypatch.setattr(links, "MAX_MANIFESTS", 4)
    await client.push("image", b"config")
    await client.push("cache", b"config")

    def body(number: int) -> bytes:
        return manifest(b"config", []) + b" " * number

    statuses = [await client.put_manifest(f"image/manifests/t{n}", body(n)) for n in range(4)]
    assert statuses == [201, 201, 201, 507]
    # A tag that is there can be moved, and a manifest that is there be pushed again.
    assert await client.put_manifest("image/manifests/t0", body(9)) == 201
    assert await client.put_manifest("image/manifests/t1", body(10)) == 507
    assert await client.put_manifest("image/manifests/t1", body(9)) == 201
    config = step_config("one")
    await client.push("cache", config)
    cached = cache_manifest(config, [])
    statuses = [await client.put_manifest(f"cache/manifests/t{n}", cached) for n in range(4)]
    assert statuses == [201, 201, 201, 507]


async def test_routes_beside_the_registry_need_no_capability(node: NodeStore) -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.query:
            raise NotFoundError("this is not mirrored")
        return web.Response(text=request.match_info["name"])

    registry = Registry()
    extra = [web.get("/v2/mirror/{name}", handler)]
    async with RegistryServer(registry, node.statistics, extra=extra) as server:
        bench = RegistryBench(node, registry, server)
        async with bench.http:
            client = await bench.client()
            root = f"{client.root}/v2/mirror"
            assert (await client.call("GET", f"{root}/busybox"))[::2] == (200, b"busybox")
            status, _, body = await client.call("GET", f"{root}/busybox?x=1")
            assert (status, json.loads(body)["errors"][0]["message"]) == (
                404, "this is not mirrored",
            )  # fmt: skip
            for method, path in (("PUT", "busybox"), ("GET", "busybox/x")):
                status, _, body = await client.call(method, f"{root}/{path}")
                assert (status, b"NAME_UNKNOWN" in body) == (404, True)

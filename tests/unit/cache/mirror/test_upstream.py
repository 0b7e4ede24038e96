"""Registries that misbehave, answered by a server that does what each test says."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from offload_cache.mirror import connection, transfer
from offload_cache.mirror.connection import Endpoint, new_session
from offload_cache.mirror.errors import AwayError, DeniedError, MissingError, UnfitError
from offload_cache.mirror.logins import LoginSource
from offload_cache.mirror.transfer import BlobPull
from offload_cache.mirror.upstream import RegistrySource, Upstream
from offload_cache.nodestore import NodeStore
from offload_core.digest import sha256_digest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

DATA = random.Random(1).randbytes(300_000)
DIGEST = sha256_digest(DATA)
MANIFEST = b'{"schemaVersion": 2}'


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{rest:.*}", handler)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def upstream(*handlers: Handler, login: LoginSource | None = None) -> AsyncIterator[Upstream]:
    """Yield a registry with mirrors; the last handler is the registry itself."""
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(handler)) for handler in handlers]
        session = await stack.enter_async_context(new_session())
        logins = [login] if login else []
        endpoints = [(Endpoint(address, http=True), logins) for address in addresses]
        yield Upstream(RegistrySource(addresses[-1], endpoints), session)


async def pull(registry: Upstream, folder, max_bytes: int = 1 << 30) -> bytes:
    async with NodeStore(folder) as store:
        cache = await store.project("web")

        async def once(client) -> int:
            async with cache.store.ingest() as writer:
                return await BlobPull(client, "base", DIGEST, writer, max_bytes).run()

        await registry.first(once)
        return (await cache.store.open_blob(DIGEST)).read_bytes()


def statuses(*answers: int | web.Response) -> Handler:
    """Answer with each status in turn, and with a good manifest when they are used up."""
    left = list(answers)

    async def handle(request: web.Request) -> web.StreamResponse:
        if left:
            answer = left.pop(0)
            return web.Response(status=answer) if isinstance(answer, int) else answer
        return web.Response(body=MANIFEST, headers={"Docker-Content-Digest": DIGEST})

    return handle


@pytest.mark.parametrize("answers", [[500], [503, 502], [429]])
async def test_short_trouble_is_waited_out(answers):
    async with upstream(statuses(*answers)) as registry:
        assert await registry.find_manifest("base", "1") == DIGEST


async def test_registry_with_too_many_requests_is_left_alone_for_as_long_as_it_says():
    limited = web.Response(status=429, headers={"Retry-After": "100"})
    async with upstream(statuses(limited)) as registry:
        for _ in range(3):
            with pytest.raises(AwayError, match="429"):
                await registry.find_manifest("base", "1")


@pytest.mark.parametrize(
    ("status", "error"), [(404, MissingError), (403, DeniedError), (401, DeniedError)]
)
async def test_answers_are_told_apart(status, error):
    async with upstream(statuses(*[status] * 5)) as registry:
        with pytest.raises(error):
            await registry.find_manifest("base", "1")


async def test_registry_without_head_or_digest_header_is_asked_with_get():
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(status=405) if request.method == "HEAD" else web.Response(body=MANIFEST)

    async def silent(_: web.Request) -> web.StreamResponse:
        return web.Response(body=MANIFEST)

    for handler in (handle, silent):
        async with upstream(handler) as registry:
            assert await registry.find_manifest("base", "1") == sha256_digest(MANIFEST)


async def test_mirrors_are_asked_before_the_registry():
    seen: list[str] = []

    async def mirror(request: web.Request) -> web.StreamResponse:
        seen.append(request.query.get("ns", ""))
        return web.Response(status=404)

    async with upstream(mirror, statuses()) as registry:
        assert await registry.find_manifest("base", "1") == DIGEST
        assert seen == [registry.host]
    async with upstream(statuses(), mirror) as registry:
        assert await registry.find_manifest("base", "1") == DIGEST
        assert len(seen) == 1


async def test_login_stays_with_the_registry_when_it_redirects(tmp_path, monkeypatch):
    monkeypatch.setenv("POOL_PASSWORD", "secret")
    seen: dict[str, str | None] = {}

    async def storage(request: web.Request) -> web.StreamResponse:
        seen["storage"] = request.headers.get("Authorization")
        seen["query"] = request.raw_path
        return ranged(request)

    async with serving(storage) as place:

        async def handle(request: web.Request) -> web.StreamResponse:
            seen["registry"] = request.headers.get("Authorization")
            if seen["registry"] is None:
                challenge = {"WWW-Authenticate": 'Basic realm="x"'}
                return web.Response(status=401, headers=challenge)
            where = {"Location": f"http://{place}/blob?signature=a%2Fb%3D"}
            return web.Response(status=307, headers=where)

        login = LoginSource("ali", password_env="POOL_PASSWORD")
        async with upstream(handle, login=login) as registry:
            assert await pull(registry, tmp_path) == DATA
    assert str(seen["registry"]).startswith("Basic ")
    assert seen["storage"] is None
    assert seen["query"] == "/blob?signature=a%2Fb%3D"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_where_a_registry_redirects_to_cannot_ask_for_the_pools_login(monkeypatch, method):
    monkeypatch.setenv("POOL_PASSWORD", "secret")
    sent: list[str | None] = []

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            sent.append(request.headers.get("Authorization"))
            return web.json_response({"token": "t"})
        asks = f'Bearer realm="http://{request.host}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": asks})

    async with serving(elsewhere) as place:

        async def handle(_: web.Request) -> web.StreamResponse:
            return web.Response(status=307, headers={"Location": f"http://{place}/blob"})

        login = LoginSource("ali", password_env="POOL_PASSWORD")
        async with upstream(handle, login=login) as registry:
            with pytest.raises(DeniedError):
                if method == "GET":
                    await registry.read_manifest("base", DIGEST)
                else:
                    await registry.find_blob("base", DIGEST)
    assert sent == []


async def test_questions_do_not_wait_for_layers_that_are_on_their_way(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    ended = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "/blobs/" not in request.path:
            return web.Response(headers={"Docker-Content-Digest": DIGEST})
        response = web.StreamResponse(headers={"Content-Length": "2"})
        await response.prepare(request)
        await response.write(b"x")
        await ended.wait()
        await response.write(b"x")
        return response

    async with upstream(handle) as registry:
        (client,) = registry._clients
        answers = [await client.request("GET", "base", f"blobs/{i}") for i in range(40)]
        assert await registry.find_manifest("base", "1") == DIGEST
        ended.set()
        for answer in answers:
            assert await answer.read() == b"xx"


async def test_redirects_in_circles_end():
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": str(request.url)})

    async with upstream(handle) as registry:
        with pytest.raises(AwayError, match="circles"):
            await registry.find_manifest("base", "1")


def ranged(request: web.Request) -> web.Response:
    wanted = request.http_range
    start, stop = wanted.start or 0, min(wanted.stop or len(DATA), len(DATA))
    return web.Response(
        status=206,
        body=DATA[start:stop],
        headers={"Content-Range": f"bytes {start}-{stop - 1}/{len(DATA)}"},
    )


async def test_blob_is_pulled_in_ranges_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "RANGE_BYTES", 50_000)
    running = most = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return ranged(request)

    async with upstream(handle) as registry:
        assert await pull(registry, tmp_path) == DATA
    assert most == transfer.PARALLEL_RANGES


async def test_transfer_that_breaks_off_goes_on_where_it_was(tmp_path):
    sent = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        start = request.http_range.start or 0
        response = web.StreamResponse(
            status=206,
            headers={
                "Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}",
                "Content-Length": str(len(DATA) - start),
            },
        )
        await response.prepare(request)
        piece = DATA[start : start + 120_000]
        sent += len(piece)
        await response.write(piece)
        if start + len(piece) < len(DATA):
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.close()
        return response

    async with upstream(handle) as registry:
        assert await pull(registry, tmp_path) == DATA
    assert sent == len(DATA)


async def test_registry_without_ranges_and_empty_answers(tmp_path):
    async def whole(_: web.Request) -> web.StreamResponse:
        return web.Response(body=DATA)

    async def refuses(request: web.Request) -> web.StreamResponse:
        return web.Response(status=416) if "Range" in request.headers else await whole(request)

    for number, handler in enumerate((whole, refuses)):
        async with upstream(handler) as registry:
            assert await pull(registry, tmp_path / str(number)) == DATA
    async with upstream(whole) as registry:
        with pytest.raises(UnfitError, match="more than"):
            await pull(registry, tmp_path / "small", max_bytes=1000)


async def test_a_pull_that_takes_for_ever_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_BLOB_SECONDS", 0.3)

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(DATA))})
        await response.prepare(request)
        for at in range(1_000):
            await response.write(DATA[at : at + 1])
            await asyncio.sleep(0.02)
        return response

    async with upstream(handle) as registry:
        with pytest.raises(AwayError, match="takes more than"):
            await pull(registry, tmp_path)
    assert not any((tmp_path / "projects" / "web" / "ingest").iterdir())


async def test_wrong_bytes_are_refused(tmp_path):
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=DATA[:-1] + b"x")

    async with upstream(handle) as registry:
        with pytest.raises(UnfitError, match="damaged"):
            await pull(registry, tmp_path)
    assert not list(tmp_path.rglob("*" + DIGEST[7:]))


async def test_registry_that_is_away_is_not_asked_at_each_request():
    started = time.monotonic()
    async with new_session() as session:
        registry = Upstream(
            RegistrySource("127.0.0.1:1", [(Endpoint("127.0.0.1:1", http=True), [])]), session
        )
        for _ in range(3):
            with pytest.raises(AwayError, match="not reachable"):
                await registry.find_manifest("base", "1")
    assert time.monotonic() - started < 3

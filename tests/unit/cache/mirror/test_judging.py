"""What a judge keeps a session from, at real sockets."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from offload_cache.mirror.connection import Connection, Endpoint, new_session
from offload_cache.mirror.errors import AwayError, RefusedError

NAMES = {
    "good.example": ["127.0.0.1"],
    "other.example": ["127.0.0.1"],
    "both.example": ["127.0.0.2", "127.0.0.1"],
    "trap.example": ["127.0.0.2"],
    "away.example": ["127.0.0.3"],
}


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """The names that this machine's resolver knows; returns what was looked up."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def find(host, *args, **options):
        asked.append(host)
        found = NAMES.get(host, [host])
        return [item for one in found for item in real(one, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    return asked


class Judging:
    """Refuses the name other.example and the address 127.0.0.2."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []

    def __call__(self, host, address, port):
        self.asked.append((host, str(address or ""), port))
        if host == "other.example":
            return "it is another"
        return "it is a trap" if "127.0.0.2" in (host, str(address)) else ""


@asynccontextmanager
async def server(host="0.0.0.0"):
    """Yield the port of a server that says which names it was asked by, and that list."""
    seen: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append(request.host.partition(":")[0])
        if target := request.query.get("to"):
            return web.Response(status=307, headers={"Location": target})
        return web.Response(text="{}")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    try:
        yield runner.addresses[0][1], seen
    finally:
        await runner.cleanup()


async def get(session, url: str) -> int:
    host = url.partition("//")[2].partition("/")[0]
    answer = await Connection(Endpoint(host, http=True), session).open("GET", url, {})
    await answer.read()
    return answer.status


async def test_host_and_address_are_judged_together_for_every_connection(names):
    judge = Judging()
    async with server() as (port, seen), new_session(judge) as session:
        assert await get(session, f"http://good.example:{port}/") == 200
        assert judge.asked == [("good.example", "", port), ("good.example", "127.0.0.1", port)]
        with pytest.raises(RefusedError, match=rf"other\.example:{port} was refused: it is ano"):
            await get(session, f"http://other.example:{port}/")
        assert "other.example" not in names
        with pytest.raises(RefusedError, match=r"trap\.example:\d+ was refused: it is a trap"):
            await get(session, f"http://trap.example:{port}/")
        with pytest.raises(RefusedError, match=r"127\.0\.0\.2:\d+ was refused: it is a trap"):
            await get(session, f"http://127.0.0.2:{port}/")
        assert await get(session, f"http://both.example:{port}/") == 200
        assert ("both.example", "127.0.0.2", port) in judge.asked
        assert seen == ["good.example", "both.example"]


async def test_a_connection_that_is_used_again_is_judged_by_its_host():
    judge = Judging()
    async with server() as (port, _), new_session(judge) as session:
        url = f"http://good.example:{port}/"
        connection = Connection(Endpoint(f"good.example:{port}", http=True), session)
        for _ in range(2):
            assert await connection.json("GET", url) == (200, {})
        assert judge.asked.count(("good.example", "", port)) == 2
        assert judge.asked.count(("good.example", "127.0.0.1", port)) == 1


async def test_requests_at_the_same_time_are_told_apart():
    judge = Judging()
    async with server() as (port, _), new_session(judge) as session:
        hosts = ["good.example", "trap.example", "both.example", "other.example"] * 5
        calls = (get(session, f"http://{host}:{port}/") for host in hosts)
        found = await asyncio.gather(*calls, return_exceptions=True)
        kinds = [item if isinstance(item, int) else type(item) for item in found]
        assert kinds == [200, RefusedError, 200, RefusedError] * 5


async def test_redirects_and_token_services_are_judged_as_other_hosts():
    async with server() as (port, seen), new_session(Judging()) as session:
        for host in ("other.example", "trap.example", "127.0.0.2"):
            target = f"http://{host}:{port}/"
            with pytest.raises(RefusedError, match=rf"{host}:\d+ was refused"):
                await get(session, f"http://good.example:{port}/?to={target}")
            connection = Connection(Endpoint("good.example", http=True), session)
            with pytest.raises(RefusedError, match=rf"{host}:\d+ was refused"):
                await connection.json("GET", target)
        assert set(seen) == {"good.example"}


async def test_through_a_proxy_host_and_port_are_judged(monkeypatch):
    judge = Judging()
    async with server("127.0.0.2") as (port, seen), new_session(judge) as session:
        # The proxy lies where its clients must not go directly.
        monkeypatch.setenv("http_proxy", f"http://127.0.0.2:{port}")
        monkeypatch.setenv("no_proxy", "")
        assert await get(session, "http://good.example/") == 200
        with pytest.raises(RefusedError, match=r"^other\.example was refused"):
            await get(session, "http://other.example/")
        assert seen == ["good.example"]
        assert judge.asked == [("good.example", "", 80), ("other.example", "", 80)]


async def test_what_is_allowed_and_not_there_is_away():
    async with server("127.0.0.1") as (port, _), new_session(Judging()) as session:
        with pytest.raises(AwayError, match="not reachable"):
            await get(session, f"http://away.example:{port}/")

"""Calls to identity providers: which URLs, through which proxy, what is believed."""

from __future__ import annotations

import pytest
from aiohttp import web

from offload_client.oidc import webcalls
from offload_client.oidc.webcalls import call_json
from offload_core.errors import AuthenticationError, ConfigError
from offload_core.weburls import check_web_url, is_loopback


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a.example",
        "file:///etc/passwd",
        "http://a.example",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "https://user:password@a.example",
        "https://a.example/#x",
        "https://a.example:99999",
        "https:///x",
        "https://a.example/\r\nX: y",
        "https://a example",
    ],
)
def test_url_that_cannot_be_believed_is_refused(url):
    with pytest.raises(ConfigError):
        check_web_url(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost", "http://[::1]:8/x"])
def test_this_machine_may_be_asked_in_the_clear(url):
    assert check_web_url(url) == url
    assert is_loopback(url)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HTTPS_PROXY": "http://proxy:1"}, {"https": "http://proxy:1"}),
        ({"https_proxy": "http://proxy:1"}, {"https": "http://proxy:1"}),
        ({"HTTP_PROXY": "http://proxy:1"}, {}),
        ({"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": "x, .example"}, {}),
        ({"HTTPS_PROXY": "http://proxy:1", "NO_PROXY": "*"}, {}),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "in.example"}, {"https": "http://p:1"}),
    ],
)
def test_proxy_is_that_of_the_command(environment, expected):
    assert webcalls._proxies("https://login.example/x", environment) == expected
    assert webcalls._proxies("http://127.0.0.1:1/", {"http_proxy": "http://proxy:1"}) == {}


@pytest.fixture
async def server():
    async def moved(_):
        raise web.HTTPFound("/secret")

    async def secret(_):
        return web.json_response({"value": "x"})

    async def large(_):
        return web.json_response({"value": "x" * (webcalls.MAX_ANSWER_BYTES + 1)})

    async def text(_):
        return web.Response(text="[1]")

    app = web.Application()
    app.add_routes(
        [web.get("/moved", moved), web.get("/secret", secret), web.get("/large", large),
         web.get("/text", text)]
    )  # fmt: skip
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_redirect_is_not_followed(server):
    answer = await call_json(f"{server}/moved", who="x", environment={})
    assert (answer.ok, answer.status, answer.body) == (False, 302, {})
    assert (await call_json(f"{server}/secret", who="x", environment={})).text("value") == "x"


@pytest.mark.parametrize("path", ["large", "text"])
async def test_answer_that_is_too_long_or_no_object_is_refused(server, path):
    with pytest.raises(AuthenticationError, match="cannot be asked"):
        await call_json(f"{server}/{path}", who="x", environment={})


async def test_nobody_there_is_an_error_of_ours(server):
    with pytest.raises(AuthenticationError, match="cannot be asked"):
        await call_json("http://127.0.0.1:1/", who="x", environment={})

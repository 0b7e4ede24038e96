"""Registry logins asked for by a real buildkitd."""

from __future__ import annotations

import asyncio
import base64

import pytest
from aiohttp import web

from offload_builder.buildkit import RegistrySettings, SessionProviders, SolveFailure
from offload_core.errors import AuthenticationError
from tests.fixtures.buildkit import build, dockerfile_source, running_daemon


class Logins:
    authority = bytes(32)

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def credentials(self, host):
        self.asked.append(host)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def token(self, request):
        raise AssertionError(f"{request} has no token service")


@pytest.fixture
async def registry():
    """A registry that has nothing, and shows it only to user:pass."""
    seen: list[str] = []
    good = "Basic " + base64.b64encode(b"user:pass").decode()

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        if seen[-1] != good:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return web.Response(status=404)

    application = web.Application()
    application.router.add_route("*", "/v2/{rest:.*}", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    yield f"127.0.0.1:{port}", seen
    await runner.cleanup()


@pytest.mark.parametrize(
    ("answer", "auth_failure"),
    [(("user", "pass"), False), (("user", "wrong"), True), (("", ""), True)],
)
async def test_the_login_is_asked_for_and_used(registry, answer, auth_failure):
    host, seen = registry
    logins = Logins(answer)
    source = dockerfile_source(f"FROM {host}/team/image:1\n")
    async with running_daemon(registries={host: RegistrySettings(http=True)}) as daemon:
        failure = await asyncio.wait_for(
            build(daemon.client, SessionProviders(source=source, credentials=logins)), 30
        )
    assert isinstance(failure, SolveFailure)
    assert failure.is_registry_auth is auth_failure
    assert set(logins.asked) == {host}
    assert any(header.startswith("Basic ") for header in seen) is bool(answer[0])


async def test_an_error_of_the_login_source_reaches_the_caller(registry):
    host, _ = registry
    logins = Logins(AuthenticationError("the credential helper did not answer"))
    source = dockerfile_source(f"FROM {host}/team/image:1\n")
    async with running_daemon(registries={host: RegistrySettings(http=True)}) as daemon:
        with pytest.raises(AuthenticationError, match="credential helper"):
            await build(daemon.client, SessionProviders(source=source, credentials=logins))

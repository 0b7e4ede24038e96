"""BuildKit asks the node about everything that a build fetches; real buildkitd, real steps."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from offload_builder.buildkit import (
    BkSession,
    BuildkitClient,
    SessionProviders,
    SolveFailure,
    SolveResult,
    SolveSpec,
)
from offload_builder.egress.urls.buildurls import BuildUrls
from offload_builder.egress.urls.urlpolicy import UrlPolicy
from tests.fixtures.buildkit import BASE, dockerfile_source, running_daemon
from tests.fixtures.nameserver import allowing
from tests.fixtures.webserver import WebServer


@dataclass
class Person:
    notices: list[str] = field(default_factory=list)

    async def notice(self, text: str, *, level: str = "warning") -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def web():
    with WebServer() as running:
        yield running


@pytest.fixture
async def client():
    async with running_daemon() as daemon:
        yield daemon.client


async def build(
    client: BuildkitClient, policy: UrlPolicy, dockerfile: str, **spec: object
) -> tuple[SolveResult | SolveFailure, BuildUrls, list[str]]:
    import asyncio

    person = Person()
    urls = BuildUrls("b1", lambda: policy, person)
    providers = SessionProviders(source=dockerfile_source(dockerfile), rules=urls)
    order = SolveSpec({"filename": "Dockerfile"}, proxy_network=policy.proxied, **spec)  # type: ignore[arg-type]

    async def follow() -> None:
        async with aclosing(client.status(order.ref)) as batches:
            async for batch in batches:
                urls.see(batch)

    async with BkSession(client, "urls", providers) as session:
        following = asyncio.ensure_future(follow())
        result = await client.solve(order, session)
        await asyncio.wait_for(following, 10)
    await urls.close()
    return result, urls, person.notices


def policy(*hosts: str, port: int, proxied: bool = False) -> UrlPolicy:
    return UrlPolicy(allowing(*hosts, ports=(port,)), proxied=proxied)


async def test_an_allowed_address_is_fetched_and_listed(client, web):
    url = f"http://localhost:{web.port}/file"
    result, urls, _ = await build(
        client, policy("localhost", port=web.port), f"FROM scratch\nADD {url}?secret=1 /f\n"
    )
    assert isinstance(result, SolveResult), result
    [use] = urls.record.uses
    assert (use.kind, use.url, use.rule_id, use.step) == ("http", url, "test", "")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("ADD http://127.0.0.1:{port}/denied /f", "http://127.0.0.1:{port}/denied"),
        ("ADD http://localhost:1/denied /f", "http://localhost:1/denied"),
        ("ADD https://git.evil.test/app.git#main /f", "https://git.evil.test/app.git"),
        ("ADD git@git.evil.test:app.git /f", "git.evil.test:app.git"),
        ("COPY --from=evil.test/app:1 / /", "evil.test/app:1"),
    ],
)
async def test_a_source_that_is_not_allowed_ends_the_build_before_any_step(
    client, web, line, shown
):
    dockerfile = f"{BASE}RUN echo ran\n{line.format(port=web.port)}\n"
    result, urls, notices = await build(client, policy("localhost", port=web.port), dockerfile)
    assert isinstance(result, SolveFailure)
    message = result.to_message().message
    assert f"egress: {shown.format(port=web.port)}" in message
    [refusal] = urls.record.refusals
    assert refusal.rule_id in message
    assert not any("denied" in item for item in web.asked)
    assert not notices


async def test_requests_of_steps_are_checked_told_and_listed_by_step(client, web):
    good, bad = f"http://localhost:{web.port}", f"http://127.0.0.1:{web.port}"
    dockerfile = (
        f"{BASE}RUN busybox wget -q -O /a {good}/one?token=x && busybox wget -q -O /b {good}/one\n"
        f"RUN busybox wget -q -O /c {good}/two; busybox wget -q -O /d {bad}/denied; true\n"
    )
    result, urls, notices = await build(
        client, policy("localhost", port=web.port, proxied=True), dockerfile
    )
    assert isinstance(result, SolveResult), result
    assert any(item.endswith("/one") for item in web.asked)
    assert not any("/denied" in item for item in web.asked)
    found = {
        (use.step.partition("RUN")[0], use.method, use.url, use.status): use.count
        for use in urls.record.uses
    }
    assert found == {
        ("[2/3] ", "GET", f"{good}/one", 200): 2,
        ("[3/3] ", "GET", f"{good}/two", 200): 1,
    }
    [refusal] = urls.record.refusals
    assert refusal.url == f"{bad}/denied"
    assert refusal.steps[0].startswith("[3/3] RUN")
    [notice] = notices
    assert f"{bad}/denied was refused" in notice
    assert "3/3" in notice


async def test_a_step_behind_the_proxy_reaches_nothing_beside_it(client, web):
    dockerfile = (
        f"{BASE}RUN unset http_proxy HTTP_PROXY; "
        f"busybox wget -T 3 -q -O /a http://127.0.0.1:{web.port}/beside && exit 1; true\n"
    )
    result, _, _ = await build(client, policy("localhost", port=web.port, proxied=True), dockerfile)
    assert isinstance(result, SolveResult), result
    assert not any("/beside" in item for item in web.asked)

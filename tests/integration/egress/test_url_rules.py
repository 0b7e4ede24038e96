"""Rules by URL, asked by a real buildkitd for real requests of steps."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from offload_builder.buildkit import (
    BkSession,
    BuildkitDaemon,
    SessionProviders,
    SolveFailure,
    SolveResult,
    SolveSpec,
)
from offload_builder.egress.policy.model import (
    Action,
    EffectivePolicy,
    HostTarget,
    Place,
    Policy,
    Posture,
    Rule,
)
from offload_builder.egress.policy.weburl import UrlTarget
from offload_builder.egress.urls.buildurls import BuildUrls
from offload_builder.egress.urls.urlpolicy import UrlPolicy
from tests.fixtures.buildkit import BASE, dockerfile_source, running_daemon
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.webserver import WebServer

PROBE = f"{BASE}COPY --chmod=755 probe /bin/probe\n"


class Person:
    def __init__(self) -> None:
        self.notices: list[str] = []

    async def notice(self, text: str, *, level: str = "warning") -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def web():
    with WebServer() as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(web):
    web.asked.clear()


@pytest.fixture
async def daemon():
    async with running_daemon(entitlements=["network.host"]) as running:
        yield running


def by_url(port: int, *more: Rule) -> UrlPolicy:
    """All below /our-org/ of localhost, but for /our-org/secret/, by HTTP and HTTPS."""
    both = [("http", port), ("https", port)]
    allowed = tuple(UrlTarget(scheme, "localhost", False, at, "/our-org/") for scheme, at in both)
    denied = tuple(
        UrlTarget(scheme, "localhost", False, at, "/our-org/secret/") for scheme, at in both
    )
    rules = (
        Rule("ours", Action.ALLOW, allowed, place=Place("policy.toml", 5)),
        Rule("no-secrets", Action.DENY, denied, place=Place("policy.toml", 9)),
        *more,
    )
    policy = Policy(Posture.ALLOWLIST, rules, name="eu-1", proxied=True)
    return UrlPolicy(EffectivePolicy(policy), proxied=True)


async def build(
    daemon: BuildkitDaemon, policy: UrlPolicy, dockerfile: str, **spec: object
) -> tuple[SolveResult | SolveFailure, BuildUrls, list[str], str]:
    person = Person()
    urls = BuildUrls("b1", lambda: policy, person)
    source = dockerfile_source(dockerfile, {"probe": egress_probe()})
    providers = SessionProviders(source=source, rules=urls)
    attributes = {"filename": "Dockerfile", **spec.pop("attributes", {})}  # type: ignore[dict-item]
    order = SolveSpec(attributes, proxy_network=policy.proxied, **spec)  # type: ignore[arg-type]
    printed = b""

    async def follow() -> None:
        nonlocal printed
        async with aclosing(daemon.client.status(order.ref)) as batches:
            async for batch in batches:
                urls.see(batch)
                printed += b"".join(log.data for log in batch.logs)

    async with BkSession(daemon.client, "urls", providers) as session:
        following = asyncio.ensure_future(follow())
        async with asyncio.timeout(90):
            result = await daemon.client.solve(order, session)
            await following
    await urls.close()
    return result, urls, person.notices, printed.decode()


GOOD = ["/our-org/x", "/our-org/", "/our-org/a%20b?x=../../evil", "/%6Fur-org/x"]
BAD = [
    "/evil", "/our-organ/x", "/OUR-ORG/x", "/our-org", "/our-org/secret/x", "/our-org/SECRET/x",
    "/our-org/secret;a=1/x", "/our-org/../evil", "/our-org/%2e%2e/evil", "/our-org/.%2E/evil",
    "/our-org/..%2fevil", "/our-org%2f..%2fevil", "//our-org/x", "/our-org//evil", "/our-org/..;/x",
    "/our-org/..%5cevil", "/our-org/..\\evil", "/our-org/%252e%252e/evil", "/our-org/%00/x",
]  # fmt: skip


@pytest.mark.parametrize("network", ["", "--network=host "])
async def test_a_step_gets_what_a_rule_names_and_nothing_beside_it(daemon, web, network):
    root = f"http://localhost:{web.port}"
    web.away = f"{root}/evil"
    good = [f"via:GET:{root}{path}" for path in GOOD] + [f"via:POST:{root}/our-org/post"]
    bad = [f"via:GET:{root}{path}" for path in BAD]
    bad += [f"via:POST:{root}/evil", f"via:GET:http://localhost:1{GOOD[0]}"]
    # Nothing answers TLS there: what is allowed gets 502 of the proxy.
    tls = f"https://localhost:{web.port}"
    good_tls = [f"via:GET:{tls}{path}" for path in GOOD]
    bad_tls = [f"via:GET:{tls}{path}" for path in BAD]
    bad_tls += ["via:GET:https://localhost/our-org/x", "via:GET:https://localhost:1/our-org/x"]
    odd = [f"follow:{root}/our-org/away", f"tcp:127.0.0.1:{web.port}", "tcp:203.0.113.1:80"]
    places = [*good, *bad, *good_tls, *bad_tls, *odd]
    quoted = " ".join(f"'{place}'" for place in places)
    result, urls, notices, printed = await build(
        daemon,
        by_url(web.port),
        f"{PROBE}RUN {network}probe {quoted}\n",
        entitlements=("network.host",),
    )
    assert isinstance(result, SolveResult), result
    found = found_in(printed)
    assert {place: found[place] for place in good} == dict.fromkeys(good, "200")
    assert {place: found[place] for place in good_tls} == dict.fromkeys(good_tls, "502")
    refused = [*bad, *bad_tls]
    assert {place: found[place] for place in refused} == dict.fromkeys(refused, "403")
    # A client that follows a redirect asks again; and there is no way beside the proxy.
    assert [found[place] for place in odd] == ["403", "refused", "unreachable"]
    assert not any("evil" in item.partition("?")[0] or "secret" in item.lower()
                   for item in web.asked)  # fmt: skip
    told = {item.url: item for item in urls.record.refusals}
    secret = told[f"{root}/our-org/secret/x"]
    assert (secret.rule_id, secret.place) == ("no-secrets", "policy.toml:9")
    assert f"deny {root}/our-org/secret/" in secret.rule_text
    twisted = told[f"{root}/our-org/%2e%2e/evil"]
    assert (twisted.rule_id, twisted.place) == ("ambiguous-url", "policy.toml:5")
    assert any(f"{root}/our-org/secret/x was refused" in item and "policy.toml:9" in item
               for item in notices)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ("ADD http://localhost:{port}/our-org/a /f", True),
        ("ADD http://localhost:{port}/our-org/secret/a /f", False),
        ("ADD http://localhost:{port}/evil /f", False),
        ("ADD http://localhost:{port}/our-org/../evil /f", False),
        ("ADD http://localhost:{port}/our-org/%2e%2e/evil /f", False),
        ("ADD http://localhost:{port}/evil/app.git#main /f", False),
        ("COPY --from=localhost:{port}/evil/app:1 / /", False),
    ],
)
async def test_sources_are_judged_by_url_before_any_step(daemon, web, line, good):
    result, urls, _, _ = await build(
        daemon, by_url(web.port), f"{BASE}{line.format(port=web.port)}\n"
    )
    assert isinstance(result, SolveResult) is good, result
    if not good:
        [refusal] = urls.record.refusals
        assert refusal.rule_id in result.to_message().message
        assert not web.asked


async def test_an_image_is_a_url_of_its_registry(daemon, web):
    path = "/v2/our-org/"
    target = UrlTarget("https", "localhost", False, web.port, path)
    policy = by_url(web.port, Rule("images", Action.ALLOW, (target,)))
    for name, allowed in (("our-org/app:1", True), ("evil/app:1", False)):
        result, urls, _, _ = await build(
            daemon, policy, f"FROM localhost:{web.port}/{name}\nRUN true\n"
        )
        # The server is no registry; what counts is who refuses.
        assert isinstance(result, SolveFailure)
        assert ("egress: " in result.to_message().message) is not allowed
        assert bool(urls.record.refusals) is not allowed


async def test_a_denied_url_wins_over_an_allowed_host(daemon, web):
    policy = by_url(web.port, Rule("host", Action.ALLOW, (HostTarget("localhost"),)))
    root = f"http://localhost:{web.port}"
    places = [f"via:GET:{root}/else", f"via:GET:{root}/our-org/secret/x"]
    _, _, _, printed = await build(daemon, policy, f"{PROBE}RUN probe {' '.join(places)}\n")
    assert [found_in(printed)[place] for place in places] == ["200", "403"]

"""Our own command and stock docker buildx on a node whose project has rules for URLs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from offload_builder.buildkit import (
    BkSession,
    BuildkitClient,
    SessionProviders,
    SolveFailure,
    SolveResult,
    SolveSpec,
)
from offload_builder.egress.policy.model import (
    Action,
    EffectivePolicy,
    Place,
    Policy,
    Posture,
    Rule,
)
from offload_builder.egress.policy.weburl import UrlTarget
from offload_builder.egress.urls.urlpolicy import UrlPolicy
from tests.fixtures.buildkit import BASE, dockerfile_source
from tests.fixtures.buildx import Buildx
from tests.fixtures.llb import source_definition
from tests.fixtures.nameserver import allowing
from tests.fixtures.node import NodePool
from tests.fixtures.registrybuilds import Person, build
from tests.fixtures.webserver import WebServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_builder.buildkit.providers import SourceUse

BUSYBOX_WGET = "RUN busybox wget -q -O /x {url}"


@pytest.fixture(scope="module")
def web():
    with WebServer() as running:
        yield running


def judge_by(runtime, policy: UrlPolicy) -> None:
    """Have the sources of a project's builds judged by a policy."""
    runtime.place = replace(runtime.place, urls=lambda: policy)


@pytest.fixture
async def pool(web):
    async with NodePool() as pool:
        agent = await pool.start_node()
        runtime = await agent.runtime("default", "")
        judge_by(runtime, UrlPolicy(allowing("localhost", ports=(web.port,)), proxied=True))
        pool.urls = runtime
        yield pool


async def test_our_own_build_is_checked_and_told(pool, web):
    good, bad = f"http://localhost:{web.port}/own", f"http://127.0.0.1:{web.port}/denied"
    dockerfile = f"{BASE}ADD {good} /f\n{BUSYBOX_WGET.format(url=bad)} || true\n"
    built = await build(pool, dockerfile)
    assert built.good, built.failure.message
    [(_, notice)] = built.person.notices
    assert f"{bad} was refused" in notice
    assert "RUN busybox wget" in notice
    refused = await build(pool, f"FROM scratch\nADD {bad} /f\n")
    assert f"egress: {bad} was refused" in refused.failure.message
    assert "rule protected-loopback" in refused.failure.message
    assert not any("/denied" in item for item in web.asked)


async def test_a_new_policy_counts_for_the_next_build(pool, web):
    dockerfile = f"FROM scratch\nADD http://localhost:{web.port}/again /f\n"
    assert (await build(pool, dockerfile)).good
    judge_by(pool.urls, UrlPolicy(allowing("other.test")))
    built = await build(pool, dockerfile)
    assert "rule default-deny" in built.failure.message


async def test_stock_buildx_is_checked_and_told(pool, web):
    good, bad = f"http://localhost:{web.port}/bx", f"http://127.0.0.1:{web.port}/denied"
    async with Buildx(pool.gateway.address, pool.keys) as user:
        user.dockerfile(
            f"ADD {good} /f\n{BUSYBOX_WGET.format(url=good)}\n"
            f"{BUSYBOX_WGET.format(url=bad)} || true\n"
        )
        result = await user.build()
        assert result.code == 0, result.output
        assert f"egress: {bad} was refused" in result.output
        assert f"- GET {good} -> 200" in result.output
        user.dockerfile(f"ADD {bad} /f\n")
        result = await user.build()
        assert result.code != 0
        assert f"egress: {bad} was refused" in result.output
    assert not any("/denied" in item for item in web.asked)


async def test_git_source_of_a_client_is_judged_where_buildkit_fetches_it(pool, web):
    # Without a scheme and a login it is HTTPS, whatever else stands before the last @.
    place = f"localhost:{web.port}/denied.git"
    shape = f"git.allowed.test:x@{place}"
    judge_by(pool.urls, UrlPolicy(allowing("git.allowed.test", ports=(22, 9418))))
    async with Buildx(pool.gateway.address, pool.keys) as user:
        for identifier, attributes in (
            (f"git://{place}", {}),
            (f"git://{shape}", {}),
            (f"git://{shape}", {"git.fullurl": shape}),
        ):
            result = await user.buildctl(
                "build", "--progress=plain", stdin=source_definition(identifier, attributes)
            )
            assert result.code != 0
            assert f"egress: https://{place} was refused" in result.output, result.output


def fetched(provenance: dict[str, Any]) -> dict[str, str]:
    """The digests of the web addresses in provenance of either version of SLSA."""
    definition = provenance.get("buildDefinition", {})
    found = definition.get("resolvedDependencies") or provenance["materials"]
    return {
        item["uri"]: item["digest"]["sha256"] for item in found if item["uri"].startswith("http")
    }


async def test_provenance_lists_what_steps_fetched_by_url_and_digest(pool, web):
    root = f"http://localhost:{web.port}"
    target = UrlTarget("http", "localhost", False, web.port, "/our-org/")
    rule = Rule("ours", Action.ALLOW, (target,), place=Place("policy.toml", 5))
    policy = EffectivePolicy(Policy(Posture.ALLOWLIST, (rule,), name="eu-1", proxied=True))
    judge_by(pool.urls, UrlPolicy(policy, proxied=True))
    hello = hashlib.sha256(b"hello").hexdigest()
    step = f"{BUSYBOX_WGET.format(url=f'{root}/our-org/tool?token=secret')}\n"
    step += f"{BUSYBOX_WGET.format(url=f'{root}/evil')} || true\n"

    person = Person(await pool.channel(assigned := await pool.assigned()), assigned)
    person.dockerfile = f"{BASE}{step}"
    person.spec.metadata_provenance = "max"
    person.spec.attestations["provenance"] = "mode=max"
    await person.start()
    result = await person.until("result")
    await person.done()
    ours = base64.b64decode(result.success.exporter_response["buildx.build.provenance"])

    async with Buildx(pool.gateway.address, pool.keys) as user:
        user.dockerfile(f"RUN echo again\n{step}")
        done = await user.build(
            "--provenance",
            "mode=max,version=v1",
            "--metadata-file",
            "m.json",
            "-o",
            "type=oci,dest=i.tar",
        )
        assert done.code == 0, done.output
        theirs = json.loads((user.context / "m.json").read_text())["buildx.build.provenance"]
    for told in (json.loads(ours), theirs):
        urls = fetched(told)
        assert not any("/evil" in url for url in urls)
        [digest] = [digest for url, digest in urls.items() if "/our-org/tool" in url]
        assert digest == hello


@dataclass
class Theirs:
    """Rules that a client brings, as buildx does from 0.31 on."""

    refused: str
    asked: list[str] = field(default_factory=list)

    def check(self, use: SourceUse) -> str:
        self.asked.append(use.identifier)
        return "by the client" if use.identifier == self.refused else ""


async def test_rules_that_a_client_brings_hold_beside_ours(pool, web):
    good, bad = f"http://localhost:{web.port}", f"http://127.0.0.1:{web.port}/denied"
    theirs = Theirs(f"{good}/theirs")
    async with (
        Buildx(pool.gateway.address, pool.keys) as user,
        unix_door(user, pool.gateway.address) as path,
    ):
        for url, words in (
            (f"{good}/both", ""),
            (f"{good}/theirs", "by the client"),
            (bad, "egress"),
        ):
            source = dockerfile_source(f"FROM scratch\nADD {url} /f\n")
            providers = SessionProviders(source=source, rules=theirs)
            client = BuildkitClient(path)
            session = BkSession(client, "", providers)
            # As all clients but ours do it: session and solve on one connection.
            session._tunnel._client = client._grpc
            async with asyncio.timeout(30), client, session:
                result = await client.solve(SolveSpec({"filename": "Dockerfile"}), session)
            if words:
                assert isinstance(result, SolveFailure)
                assert words in "".join(result.refusals)
            else:
                assert isinstance(result, SolveResult), result
    assert f"{good}/both" in theirs.asked
    assert bad not in theirs.asked
    assert not any(item.endswith(("/denied", "/theirs")) for item in web.asked)


@asynccontextmanager
async def unix_door(user: Buildx, address: str) -> AsyncIterator[Path]:
    """A unix socket that leads to the pool's BuildKit address, with the user's certificate."""
    context = ssl.create_default_context(cafile=user.home / "ca.pem")
    context.load_cert_chain(user.home / "cert.pem", user.home / "key.pem")
    host, _, port = address.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname="default.buildkit.offload"
        )
        await asyncio.gather(pump(reader, back), pump(there, writer))

    path = user.home / "door"
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()

"""A whole node, behind its firewall, with a policy that names URLs."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.buildkit import (
    BkSession,
    SessionProviders,
    SolveFailure,
    SolveResult,
    SolveSpec,
)
from offload_core.errors import AccessDeniedError
from offload_core.versions import call_metadata
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest, ExplainEgressRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.buildkit import BASE, dockerfile_source
from tests.fixtures.egressprobe import egress_probe, found_in
from tests.fixtures.egressworld import ALLOWED, DENIED
from tests.fixtures.nameserver import name_server
from tests.fixtures.node import NodePool
from tests.integration.egress.test_isolated_node import built, ended, machine, printed

__all__ = ["machine"]

POLICY = """\
posture = "allowlist"
pool = "eu-1"
contact = "#builds"
proxied = true

[[rule]]
id = "files"
allow = ["http://files.example/our-org/*", "http://files.example/probe"]

[[rule]]
id = "no-secrets"
deny = ["http://files.example/our-org/secret/"]

[[rule]]
id = "images"
allow = ["https://images.example:5000/v2/our-org/"]
"""
NAMES = (f"files.example. 60 IN A {ALLOWED}", f"evil.example. 60 IN A {DENIED}")
GET = "via:GET:http://files.example"


@pytest.mark.usefixtures("machine")
async def test_steps_of_a_node_reach_urls_through_the_proxy_and_the_server_not_at_all(world):
    world.files["/probe"] = egress_probe()
    good = f"{GET}/our-org/x"
    refused = [f"{GET}/", f"{GET}/our-org/secret/x", f"{GET}/our-org/%2e%2e/x",
               "via:GET:http://files.example:8080/our-org/x",
               "via:GET:http://evil.example/our-org/x"]  # fmt: skip
    beside = f"tcp:{ALLOWED}:80"
    start = "ADD --chmod=755 http://files.example/probe /bin/probe\n"
    step = f"RUN probe {good} {' '.join(refused)} {beside}\n"
    async with NodePool() as pool, name_server(*NAMES) as names:
        agent = await pool.start_node(isolation="netns", dns_servers=[str(names.server)])
        before = await built(pool, start + f"RUN probe {beside}\n")
        assert found_in(printed(before))[beside] == "ok"
        stub = EgressServiceStub(await pool.gateway.channel(await pool.gateway.login("")))
        request = ApplyPolicyRequest(text=POLICY, file="policy.toml")
        await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
        policies = pool._running["one"][0].policies
        async with asyncio.timeout(20):
            await policies.wait_for(lambda held: held.versions() == {"": 1})

        client = await built(pool, start + step)
        found = found_in(printed(client))
        assert found[good] == "200"
        assert {place: found[place] for place in refused} == dict.fromkeys(refused, "403")
        assert found[beside] == "unreachable"
        told = [use for seen in client.seen for use in seen.progress.egress]
        secret = next(use for use in told if use.url.endswith("/our-org/secret/x"))
        assert (secret.rule_id, secret.place) == ("no-secrets", "policy.toml:10")

        away = await ended(pool, "FROM scratch\nADD http://files.example/else /f\n")
        assert "egress: http://files.example/else was refused" in away.failure.message
        assert 'the rule "files" (policy.toml:6) is about other URLs' in away.failure.message

        # Pushes of the node itself are judged by repository.
        judge = agent.isolation.judge("default")
        judge.check("images.example:5000", "our-org/app")
        with pytest.raises(AccessDeniedError, match=r"images\.example:5000/evil/app was refused"):
            judge.check("images.example:5000", "evil/app")

        explain = ExplainEgressRequest(project_id="default", target=GET[8:] + "/our-org/secret/x")
        answer = await stub.ExplainEgress(explain, metadata=call_metadata(), timeout=20)
        assert (answer.allowed, answer.rule_id) == (False, "no-secrets")

        # What is not behind the proxy, as of a build that began before, is not started.
        runtime = await agent.runtime("default", "")
        for network, starts in (("", False), ("--network=none ", True)):
            source = dockerfile_source(f"{BASE}RUN {network}echo started\n")
            spec = SolveSpec({"filename": "Dockerfile"})
            async with (
                runtime.use() as bk,
                BkSession(bk, "k", SessionProviders(source=source)) as s,
            ):
                async with asyncio.timeout(60):
                    result = await bk.solve(spec, s)
            assert isinstance(result, SolveResult if starts else SolveFailure), result

        # Without URLs in the policy, they are started again.
        request = ApplyPolicyRequest(text='posture = "open"\n', file="policy.toml")
        await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
        async with asyncio.timeout(20):
            await policies.wait_for(lambda held: held.versions() == {"": 2})
        after = await built(pool, start + f"RUN probe {beside} # again\n")
        assert found_in(printed(after))[beside] == "ok"

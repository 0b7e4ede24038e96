"""Policies from an administrator to nodes and members: a real gateway, real links, real files."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from offload_builder.cli.entry import main
from offload_builder.egress.held import NOT_ENFORCED, HeldPolicies
from offload_builder.egress.policy.evaluate import evaluate
from offload_builder.egress.policy.model import Attempt, Posture
from offload_core.errors import (
    AccessDeniedError,
    ConfigError,
    GatewayUnreachableError,
    UsageError,
)
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1 import egress_service_pb2 as egress_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.gateway import RunningGateway
from tests.fixtures.node import NodePool

SECONDS = 10.0
POOL = """pool = "eu-1"
posture = "allowlist"
contact = "#net"
presets = ["pypi"]
projects_may_allow = ["*.shop.example"]
"""
OWN = '[[rule]]\nid = "cdn"\nallow = ["cdn.shop.example"]\nports = [443]\n'


@pytest.fixture
async def pool():
    async with NodePool() as running:
        await running.gateway.create_project("shop")
        yield running


async def service(gateway: RunningGateway, token: str = "") -> EgressServiceStub:
    return EgressServiceStub(await gateway.channel(await gateway.login(token)))


async def apply(gateway: RunningGateway, text: str, **fields: object) -> int:
    request = egress_pb.ApplyPolicyRequest(text=text, file="policy.toml", **fields)
    stub = await service(gateway)
    reply = await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=SECONDS)
    return int(reply.version)


async def failure(call: object) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return error_from_rpc(caught.value, peer="the gateway", unreachable=GatewayUnreachableError)


async def on_node(pool: NodePool, /, **versions: int) -> HeldPolicies:
    """Return what the node holds, once it holds these versions; `pool` is the pool's."""
    wanted = {"" if name == "pool" else name: number for name, number in versions.items()}
    policies = pool._running["one"][0].policies
    async with asyncio.timeout(SECONDS):
        await policies.wait_for(lambda held: held.versions() == wanted)
    return policies


def allowed(policies: HeldPolicies, project_id: str, host: str, port: int = 443) -> bool:
    address = ipaddress.ip_address("203.0.113.5")
    return evaluate(policies.of_project(project_id), Attempt(host, address, port)).allowed


async def command(gateway: RunningGateway, *arguments: str, code: int = 0) -> str:
    """Run `offload-builder policy` beside a gateway and return its standard output."""
    data = ["--data-dir", str(gateway.directory)]
    done = await asyncio.to_thread(CliRunner().invoke, main, ["policy", *arguments, *data])
    assert done.exit_code == code, done.output
    return done.stdout


async def versions_of(gateway: RunningGateway) -> list[int]:
    stub = await service(gateway)
    request = egress_pb.ListPolicyVersionsRequest()
    reply = await stub.ListPolicyVersions(request, metadata=call_metadata(), timeout=SECONDS)
    return [item.version for item in reply.versions]


async def test_an_applied_policy_reaches_the_node_as_a_whole(pool):
    await pool.start_node()
    policies = await on_node(pool)
    assert policies.held.pool.posture is Posture.OPEN
    seen: list[tuple[bool, bool]] = []

    async def listener(held: object) -> None:
        seen.append((allowed(policies, "", "pypi.org"), allowed(policies, "", "evil.example")))

    policies.on_change(listener)
    assert await apply(pool.gateway, POOL) == 1
    await on_node(pool, pool=1)
    assert await apply(pool.gateway, OWN, project_id="shop") == 1
    await on_node(pool, pool=1, shop=1)
    assert allowed(policies, "shop", "cdn.shop.example")
    assert not allowed(policies, "shop", "cdn.shop.example", 80)
    assert not allowed(policies, "other", "cdn.shop.example")
    # Never something between the policies: no state had the posture without the preset.
    assert set(seen) <= {(True, True), (True, False)}
    assert seen[-2:] == [(True, False)] * 2
    assert policies.of_project("shop").rules[0].place.file == "policy.toml"


async def test_a_node_without_its_gateway_stays_under_the_last_policy(pool):
    await apply(pool.gateway, POOL)
    node = await pool.start_node()
    await on_node(pool, pool=1)
    path = node.config.data / "egress.json"
    await pool.gateway.stop()
    async with HeldPolicies(path) as again:
        assert again.held.versions() == {"": 1}
        assert allowed(again, "shop", "pypi.org")
        assert not allowed(again, "shop", "evil.example")
    await asyncio.to_thread(path.write_text, "{}x")
    async with HeldPolicies(path) as broken:
        assert not allowed(broken, "shop", "pypi.org")


async def test_a_policy_that_a_node_cannot_read_changes_nothing_there(tmp_path):
    def message(*texts: tuple[str, int, str]) -> nodes_pb.AttachResponse:
        policies = [
            nodes_pb.EgressPolicy(project_id=scope, version=version, file="p", text=text)
            for scope, version, text in texts
        ]
        return nodes_pb.AttachResponse(egress_policies=nodes_pb.EgressPolicies(policies=policies))

    async with HeldPolicies(tmp_path / "egress.json") as policies, asyncio.timeout(SECONDS):
        policies.take_message(message(("", 1, POOL), ("shop", 1, OWN)))
        await policies.wait_for(lambda held: held.versions() == {"": 1, "shop": 1})
        policies.take_message(message(("", 2, 'posture = "new"'), ("shop", 2, "")))
        policies.take_message(message(("", 3, POOL), ("shop", 1, "[[rule]]")))
        await asyncio.sleep(0.2)
        assert policies.held.versions() == {"": 1, "shop": 1}
        assert policies.problem.startswith("the node keeps its former egress policies: p:1: ")
        assert allowed(policies, "shop", "cdn.shop.example")
        policies.take_message(message(("", 4, POOL)))
        await policies.settled()
        assert policies.held.versions() == {"": 4}
        assert policies.problem == ""
        assert not allowed(policies, "shop", "cdn.shop.example")
    async with HeldPolicies(tmp_path / "egress.json") as policies:
        assert policies.held.versions() == {"": 4}


async def test_listeners_hear_when_a_rule_expires_and_when_they_have_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.egress.held.RETRY_SECONDS", 0.05)
    end = datetime.now(UTC) + timedelta(seconds=1)
    text = f'posture = "allowlist"\n{OWN}expires = {end.isoformat()}\n'
    told: list[bool] = []
    problems: list[str] = []

    async def listener(held: object) -> None:
        problems.append(policies.problem)
        told.append(allowed(policies, "", "cdn.shop.example"))
        if len(told) == 1:
            raise ConfigError("the kernel did not take it")

    async with HeldPolicies(tmp_path / "egress.json") as policies, asyncio.timeout(SECONDS):
        policies.on_change(listener)
        item = nodes_pb.EgressPolicy(version=1, file="p", text=text)
        policies.take_message(
            nodes_pb.AttachResponse(egress_policies=nodes_pb.EgressPolicies(policies=[item]))
        )
        while len(told) < 3:
            await asyncio.sleep(0.02)
    assert told == [True, True, False]
    assert problems == ["", NOT_ENFORCED, ""]


async def test_a_node_that_cannot_enforce_the_policy_says_so_in_its_health(pool):
    agent = await pool.start_node()
    assert agent.heartbeat().health == ""
    await apply(pool.gateway, POOL)
    await on_node(pool, pool=1)
    assert "cannot enforce" in agent.heartbeat().health


async def test_only_an_administrator_changes_policies(pool):
    gateway = pool.gateway
    stub = await service(gateway, await gateway.create_token("m", identity_pb.ROLE_MEMBER, "shop"))
    for call in (
        stub.ApplyPolicy(egress_pb.ApplyPolicyRequest(text=POOL), metadata=call_metadata()),
        stub.ApplyPolicy(
            egress_pb.ApplyPolicyRequest(text=OWN, project_id="shop"), metadata=call_metadata()
        ),
        stub.RollbackPolicy(egress_pb.RollbackPolicyRequest(), metadata=call_metadata()),
        stub.ListPolicyVersions(egress_pb.ListPolicyVersionsRequest(), metadata=call_metadata()),
    ):
        assert isinstance(await failure(call), AccessDeniedError)
    assert await versions_of(gateway) == []


async def test_a_broken_policy_changes_nothing_and_says_why(pool):
    gateway = pool.gateway
    await apply(gateway, POOL)
    stub = await service(gateway)
    request = egress_pb.ApplyPolicyRequest(text=POOL + "x = 1\n[[rule]]\n", file="p.toml")
    error = await failure(stub.ApplyPolicy(request, metadata=call_metadata()))
    assert isinstance(error, ConfigError)
    lines = error.message.splitlines()
    assert lines[0].startswith('p.toml:6: unknown key "x"')
    assert lines[1].startswith("p.toml:7: a rule needs an id")
    own = OWN.replace("cdn.shop.example", "evil.example")
    request = egress_pb.ApplyPolicyRequest(text=own, file="s.toml", project_id="shop")
    error = await failure(stub.ApplyPolicy(request, metadata=call_metadata()))
    assert str(error).startswith('s.toml:1: the rule "cdn" allows evil.example, but the pool eu-1')
    request = egress_pb.ApplyPolicyRequest(text=POOL + "#", expected_version=7)
    assert isinstance(
        await failure(stub.ApplyPolicy(request, metadata=call_metadata())), UsageError
    )
    assert await versions_of(gateway) == [1]


async def test_two_who_apply_at_once_get_two_versions_or_a_sentence(pool):
    texts = [f'posture = "open"\ncontact = "{number}"\n' for number in range(4)]
    done = await asyncio.gather(
        *(apply(pool.gateway, text) for text in texts), return_exceptions=True
    )
    numbers = sorted(item for item in done if isinstance(item, int))
    assert numbers == list(range(1, len(numbers) + 1))
    for item in done:
        if not isinstance(item, int):
            error = error_from_rpc(item, peer="g", unreachable=GatewayUnreachableError)
            assert isinstance(error, UsageError)


async def test_commands_beside_the_gateway_reach_nodes_too(pool, tmp_path):
    await pool.start_node()
    file = tmp_path / "policy.toml"

    async def run(*arguments: str, code: int = 0) -> str:
        return await command(pool.gateway, *arguments, code=code)

    await asyncio.to_thread(file.write_text, POOL)
    await run("apply", str(file), "--note", "first")
    await on_node(pool, pool=1)
    await asyncio.to_thread(file.write_text, POOL.replace("pypi", "npm"))
    assert "preset-npm" in await run("diff", str(file))
    assert "[narrower]" in await run("apply", str(file))
    policies = await on_node(pool, pool=2)
    assert not allowed(policies, "shop", "pypi.org")
    assert "no rule of pool eu-1" in await run("explain", "pypi.org:443", code=4)
    await run("rollback", "1")
    policies = await on_node(pool, pool=3)
    assert allowed(policies, "shop", "pypi.org")
    await run("explain", "pypi.org:443", "--project", "shop")
    assert (await run("show", "--text")).startswith(POOL)
    listed = await run("versions")
    for part in ("version 1 again", "first", "NOTE"):
        assert part in listed
    await run("versions", "--project", "none", code=5)
    assert await versions_of(pool.gateway) == [3, 2, 1]


async def test_members_see_and_explain_the_policy_of_their_project(pool, tmp_path):
    gateway = pool.gateway
    await apply(gateway, POOL)
    await apply(gateway, OWN, project_id="shop")
    token = await gateway.create_token("m", identity_pb.ROLE_MEMBER, "shop")

    async def run(*arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("offload")), *arguments,
            env={**os.environ, "OFFLOAD_CONFIG_DIR": str(tmp_path / "config")},
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        return process.returncode or 0, out.decode()

    code, text = await run("login", f"https://{gateway.address}", "--token", token)
    assert code == 0, text
    code, text = await run("policy", "show", "--project", "shop")
    assert code == 0, text
    assert "Posture   allowlist: only what a rule allows is allowed" in text
    assert "cdn allow cdn.shop.example port 443 tcp project policy.toml:1" in " ".join(text.split())
    code, text = await run("policy", "explain", "cdn.shop.example:443", "--project", "shop")
    assert (code, text.splitlines()[0]) == (0, "Allowed   cdn.shop.example:443")
    code, text = await run(
        "policy", "explain", "x.example:443", "--project", "shop", "--format", "json"
    )
    told = json.loads(text)
    assert (code, told["rule_id"], told["allowed"]) == (4, "default-deny", False)
    assert told["ask"].startswith("ask #net for x.example:443")

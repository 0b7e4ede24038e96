"""What a build reached, told at its end; and the circle from there to a policy."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload_builder.cli.entry import main
from offload_core.versions import call_metadata
from offload_proto.v1.egress_service_pb2 import ApplyPolicyRequest, LearnPolicyRequest
from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub
from tests.fixtures.contexts import BASE, busybox
from tests.fixtures.egressworld import ALLOWED, DENIED
from tests.fixtures.node import NodePool
from tests.integration.egress.test_reports import START, build, firewalled, lines

OPEN = f"""\
pool = "eu-1"
posture = "open"

[[rule]]
id = "bad"
deny = ["evil.example", "{DENIED}"]
"""
CLOSED = """\
pool = "eu-1"
posture = "allowlist"

[[rule]]
id = "files"
allow = ["files.example"]
ports = [80]
"""
REACHED, EVIL, RAW = "http:files.example:80/", "http:evil.example:443/", f"tcp:{DENIED}:80"
STEPS = f"{START}RUN probe {REACHED} {EVIL} {RAW} || true\n"


async def service(pool: NodePool) -> EgressServiceStub:
    return EgressServiceStub(await pool.gateway.channel(pool.keys))


async def learned(pool: NodePool, build_id: str, **wish: bool):
    stub = await service(pool)
    request = LearnPolicyRequest(build_ids=[build_id], **wish)
    return await stub.LearnPolicy(request, metadata=call_metadata(), timeout=20)


async def apply(pool: NodePool, text: str, version: int) -> None:
    """Put a policy in force at the node."""
    stub = await service(pool)
    request = ApplyPolicyRequest(text=text, file="learned.toml")
    await stub.ApplyPolicy(request, metadata=call_metadata(), timeout=20)
    async with asyncio.timeout(20):
        await pool._running["one"][0].policies.wait_for(lambda held: held.versions()[""] == version)


@pytest.fixture
async def pool(world, monkeypatch):
    async with firewalled(world, monkeypatch, OPEN) as one:
        yield one


def places(reply, *, allowed: bool) -> set[str]:
    uses = [item.use for item in reply.uses if item.use.allowed is allowed]
    return {use.url or f"{use.host or use.address}:{use.port}" for use in uses}


async def test_what_a_build_reached_becomes_a_policy_under_which_it_passes(pool):
    client, result = await build(pool, STEPS)
    assert result.HasField("success"), result
    reply = await learned(pool, client.assigned.build_id)
    reached, refused = places(reply, allowed=True), places(reply, allowed=False)
    assert {"files.example:80", "http://files.example/probe"} <= reached
    assert {"evil.example:0", f"{DENIED}:80"} <= refused
    steps = {item.step for item in reply.uses if item.use.host == "files.example"}
    assert any("RUN probe" in step for step in steps)
    assert any(step.endswith("ADD --chmod=755 http://files.example/probe /bin/probe")
               for step in steps)  # fmt: skip
    assert "evil.example" not in reply.text
    assert DENIED not in reply.text

    await apply(pool, reply.text, 2)
    client, result = await build(pool, STEPS.replace("|| true", "|| true; probe " + REACHED))
    assert result.HasField("success"), result
    ((_, said),) = lines(client).items()
    assert not [line for line in said if "files.example" in line]
    assert [line for line in said if "refused evil.example (rule default-deny" in line]


async def test_what_an_allow_list_refused_can_be_allowed(world, monkeypatch):
    steps = f"{START}RUN probe tcp:new.example:80 tcp:{DENIED}:80 && test ! -e /no\n"
    async with firewalled(world, monkeypatch, CLOSED) as pool:
        client, _ = await build(pool, steps)
        reply = await learned(pool, client.assigned.build_id)
        assert '# allow = ["new.example"]' in reply.text
        assert f'# allow = ["{DENIED}"]' in reply.text
        reply = await learned(pool, client.assigned.build_id, with_refused=True)
        assert '\nallow = ["new.example"]\nports = [443]' in reply.text
        await apply(pool, reply.text, 2)
        client, result = await build(pool, steps.replace("/no", "/none"))
        assert result.HasField("success"), result
        told = [line for said in lines(client).values() for line in said]
        assert not [line for line in told if DENIED in line]


async def test_requests_behind_the_proxy_are_learned_by_url(world, monkeypatch):
    policy = OPEN.replace("posture", "proxied = true\nposture", 1)
    async with firewalled(world, monkeypatch, policy) as pool:
        steps = f"{START}RUN busybox wget -q -O /x http://new.example/\n"
        client, result = await build(pool, steps)
        assert result.HasField("success"), result
        reply = await learned(pool, client.assigned.build_id)
        assert "http://new.example/" in places(reply, allowed=True)
        assert 'allow = ["files.example", "new.example"]\nports = [80]' in reply.text


async def test_the_command_prints_the_report_and_learns_afterwards(pool, tmp_path):
    environment = {**os.environ, "OFFLOAD_CONFIG_DIR": str(tmp_path / "config")}

    async def run(program: str, *arguments: str, code: int = 0) -> tuple[str, str]:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name(program)), *arguments, env=environment,
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == code, err.decode()
        return out.decode(), err.decode()

    def files() -> None:
        tmp_path.joinpath("busybox").write_bytes(Path(busybox()).read_bytes())
        tmp_path.joinpath("busybox").chmod(0o755)
        tmp_path.joinpath("Dockerfile").write_text(f"{BASE}{STEPS}RUN exit 3\n")

    await asyncio.to_thread(files)
    address = f"https://{pool.gateway.address}"
    await run("offload", "login", address, "--token", pool.gateway.admin_token)
    _, err = await run(
        "offload-build", "--network-report", "--network-report-file", "net.json",
        "--progress=quiet", ".", code=1,
    )  # fmt: skip
    rows = [" ".join(line.split()) for line in err.splitlines()]
    refused = rows[rows.index("Refused in the network:") :]
    assert refused[1] == "TARGET PROTOCOL TIMES RULE STEP"
    assert [row for row in refused if row.startswith("evil.example any ") and " bad [" in row]
    assert [row for row in refused if row.startswith(f"{DENIED}:80 tcp 1 bad [")]
    reached = rows[rows.index("Reached in the network:") :]
    assert [row for row in reached if row.startswith("files.example:80 tcp ")]
    assert 'allow = ["files.example"]' in rows
    kept = json.loads(tmp_path.joinpath("net.json").read_text())
    assert {item["host"] for item in kept["refused"]} >= {"evil.example"}
    (build_id,) = {item["build"] for item in kept["reached"]}
    out, _ = await run("offload", "policy", "learn", build_id)
    assert out.rstrip() == kept["proposal"].rstrip()

    def operator(*arguments: str) -> str:
        data = ["--data-dir", str(pool.gateway.directory)]
        done = CliRunner().invoke(main, ["policy", "learn", *arguments, *data])
        assert done.exit_code == 0, done.output
        return done.stdout

    for arguments in ((build_id,), ("--project", "default", "--since", "1h")):
        text = await asyncio.to_thread(operator, *arguments)
        assert 'allow = ["files.example"]' in text
    assert ALLOWED not in text

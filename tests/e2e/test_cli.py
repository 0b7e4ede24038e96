"""The commands around a build, pipelines with a token only, and relayed nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.test_services import Service, builder
from tests.fixtures.contexts import make_context
from tests.fixtures.pool import BIN, Member, wait_for_text
from tests.fixtures.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Pool


def test_status_tells_gateway_member_and_nodes(pool: Pool, member: Member) -> None:
    result = member.offload("status", "--format", "json")
    assert result.returncode == 0, result.stderr
    status = json.loads(result.stdout)
    assert status["gateway"] == pool.address
    assert status["role"] == "admin"
    # Other tests may have made some more in this pool.
    assert "default" in status["projects"]
    assert [node["node_id"] for node in status["nodes"]] == ["node-1", "node-2"]
    assert {node["state"] for node in status["nodes"]} == {"ready"}
    pretty = member.offload("status").stdout
    assert re.search(rf"^Gateway +{pool.address} ", pretty, re.MULTILINE)
    assert re.search(r"^node-1 +ready +\d/\d ", pretty, re.MULTILINE)


def test_builds_lists_and_shows(member: Member, tmp_path: Path) -> None:
    result = member.build("-t", "shown:1", make_context(tmp_path / "c", "RUN echo shown\n"))
    assert result.returncode == 0, result.stderr
    newest = member.wait_state("succeeded")
    table = member.offload("builds", "-n", "1").stdout.splitlines()
    assert len(table) == 2
    assert table[0].startswith("BUILD ID")
    assert newest["build_id"] in table[1]
    one = member.offload("builds", newest["build_id"][:8])
    assert re.search(r"^Name +shown:1$", one.stdout, re.MULTILINE)
    assert json.loads(
        member.offload("builds", newest["build_id"], "--format", "json").stdout
    )["build_id"] == newest["build_id"]  # fmt: skip
    unknown = member.offload("builds", "nosuchbuild")
    assert unknown.returncode == 5
    assert unknown.stderr.count("ERROR: ") == 1


def test_logs_follow_a_running_build_and_cancel_ends_it(member: Member, tmp_path: Path) -> None:
    building = member.start(make_context(tmp_path / "c", "RUN echo begun && sleep 600\n"))
    wait_for_text(building, "begun")
    newest = member.builds()[0]
    following = subprocess.Popen(
        member.command("offload", "logs", "-f", newest["build_id"]),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=member.environment,
    )  # fmt: skip
    assert following.stdout is not None
    assert any("begun" in line for line in following.stdout)
    canceled = member.offload("cancel", newest["build_id"][:8])
    assert canceled.returncode == 0, canceled.stderr
    _, errors = building.communicate(timeout=20)
    assert building.returncode == 130, errors
    following.communicate(timeout=20)
    assert following.returncode == 0
    member.wait_state("canceled")


def test_results_into_a_pipe_that_nobody_reads(member: Member, tmp_path: Path) -> None:
    assert member.build(make_context(tmp_path / "c")).returncode == 0
    for command in ("offload builds", f"offload-build -q -o - {tmp_path}/c"):
        done = subprocess.run(
            ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
            capture_output=True, text=True, env=member.environment, timeout=60,
        )  # fmt: skip
        assert done.stdout in ("141\n", "0\n")
        assert done.stderr == ""
    full = subprocess.run(
        ["bash", "-c", "offload builds > /dev/full"],
        capture_output=True, text=True, env=member.environment, timeout=60,
    )  # fmt: skip
    assert full.returncode == 3
    assert full.stderr == "ERROR: cannot write to standard output: No space left on device\n"


def test_logout_forgets_and_login_takes_the_token_from_standard_input(
    pool: Pool, member: Member
) -> None:
    assert member.offload("logout").returncode == 0
    refused = member.offload("status")
    assert refused.returncode == 4
    assert "you are not logged in" in refused.stderr
    assert "Not logged in" in member.offload("logout").stdout
    done = subprocess.run(
        member.command("offload", "login", f"https://{pool.address}", "--token-stdin"),
        input=f"{pool.admin_token}\n", capture_output=True, text=True, env=member.environment,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pool.admin_token not in done.stdout + done.stderr
    assert member.offload("status").returncode == 0
    stored = [path for path in (member.home / ".config").rglob("*") if path.is_file()]
    assert {path.name for path in stored} == {"config.toml", "identity"}
    secret = pool.admin_token.split("_")[2]
    assert not any(secret in path.read_text() for path in stored)
    assert all(path.stat().st_mode & 0o077 == 0 for path in stored if path.name == "identity")


def test_token_in_the_environment_is_enough_and_nothing_is_written(
    pool: Pool, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    token = pool.create_token("pipeline", "ci")
    environment = {"OFFLOAD_TOKEN": token, "OFFLOAD_GATEWAY": pool.address, "TMPDIR": str(home)}
    member = Member(home, environment)
    del member.environment["OFFLOAD_RESIDENT"]
    context = make_context(tmp_path / "c", "COPY note /note\n", note="x")
    before = {path: path.stat().st_mtime_ns for path in context.iterdir()}
    result = member.build("-t", "x", context)
    assert result.returncode == 0, result.stderr
    assert "pipeline" in member.offload("status").stdout
    assert list(home.rglob("*")) == []
    assert {path: path.stat().st_mtime_ns for path in context.iterdir()} == before
    assert token not in result.stdout + result.stderr
    wrong = member.build(context, OFFLOAD_TOKEN=token.replace("ofl_", "ofl_x"))
    assert wrong.returncode == 4
    assert token.split("_")[2] not in wrong.stderr


@pytest.mark.parametrize(("version", "words"), [(0, "too old"), (99, "newer than")])
def test_other_protocol_version_is_one_sentence(
    member: Member, tmp_path: Path, version: int, words: str
) -> None:
    code = (
        "import sys, offload_core.versions as versions;"
        f"versions.API_VERSION = {version};"
        "from offload_client.cli.entry import build_main; build_main()"
    )
    context = make_context(tmp_path / "c")
    result = subprocess.run(
        [BIN / "python", "-c", code, "--progress", "plain", context],
        capture_output=True, text=True, env=member.environment, timeout=60,
    )  # fmt: skip
    assert result.returncode == 13, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("ERROR: ")
    assert words in line


def test_interrupt_does_not_wait_for_the_hashing_of_a_huge_file(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "COPY huge /huge\n")
    with (context / "huge").open("wb") as file:
        file.truncate(40 << 30)
    building = member.start(context)
    wait_for_text(building, "load build context")
    time.sleep(0.3)
    began = time.monotonic()
    building.send_signal(signal.SIGINT)
    _, errors = building.communicate(timeout=30)
    assert time.monotonic() - began < 2.0
    assert building.returncode == 130
    assert errors.splitlines()[-1] == "ERROR: canceled"


def test_output_that_nobody_reads_does_not_hold_up_an_interrupt(
    member: Member, tmp_path: Path
) -> None:
    context = make_context(tmp_path / "c", "RUN head -c 3000000 /dev/urandom > /big\n")
    building = subprocess.Popen(
        member.command("offload-build", "--progress", "plain", "-o", "-", context),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=member.environment,
    )  # fmt: skip
    wait_for_text(building, "sending tarball")
    time.sleep(0.3)
    began = time.monotonic()
    building.send_signal(signal.SIGINT)
    assert building.wait(10) == 130
    assert time.monotonic() - began < 3.0
    building.communicate()


@contextmanager
def gateway(folder: Path) -> Iterator[tuple[str, str]]:
    """A gateway alone; yields its address and the administrator's token."""
    address = f"127.0.0.1:{free_port()}"
    with Service(
        folder / "g.log", "gateway", "--listen", address, "--data-dir", folder / "gateway"
    ) as service:
        yield address, service.wait_for(r"^ofl_\S+")[0]


@pytest.mark.parametrize("advertise", [[], ["127.0.0.1:1"]], ids=["relay-only", "dead-address"])
def test_node_that_only_the_relay_reaches(tmp_path: Path, advertise: list[str]) -> None:
    with gateway(tmp_path) as (address, admin_token):
        token = builder(
            "token", "create", "n", "--role", "node", "--data-dir", tmp_path / "gateway"
        ).stdout
        (tmp_path / "token").write_text(token)
        listen = f"127.0.0.1:{free_port()}"
        (tmp_path / "node.toml").write_text(
            f'gateway = "{address}"\ndata = "{tmp_path}/node"\nnode_id = "n"\n'
            f'token_file = "{tmp_path}/token"\nlisten = "{listen}"\nadvertise = {advertise}\n'
        )
        with Service(tmp_path / "n.log", "node", "--config", tmp_path / "node.toml") as node:
            node.wait_for("gateway.attached")
            (tmp_path / "home").mkdir()
            member = Member(
                tmp_path / "home", {"OFFLOAD_TOKEN": admin_token, "OFFLOAD_GATEWAY": address}
            )
            context = make_context(tmp_path / "c", "COPY big /big\nRUN cat /big | wc -c\n")
            (context / "big").write_bytes(os.urandom(5_000_000))
            began = time.monotonic()
            result = member.build("-o", f"type=oci,dest={tmp_path}/i.tar", context)
            assert result.returncode == 0, result.stderr
            assert "5000000" in result.stderr
            assert (tmp_path / "i.tar").stat().st_size > 5_000_000
            again = member.build(context)
            assert again.returncode == 0, again.stderr
            assert time.monotonic() - began < 30

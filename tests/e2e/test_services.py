"""Gateway and node as separate services, configured by files and variables."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import BIN, COMMAND_SECONDS, Member
from tests.fixtures.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path


class Service:
    """One of our services in a process of its own; a context manager."""

    def __init__(self, log: Path, *arguments: str | Path, **environment: str) -> None:
        self._log = log
        self._command = [str(BIN / "offload-builder"), *map(str, arguments)]
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log()

    def log(self) -> str:
        """Return what the service printed."""
        return self._log.read_text("utf-8", "replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the service prints something."""
        deadline = time.monotonic() + 30
        while not (found := re.search(pattern, self.log(), re.MULTILINE)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.log()
            time.sleep(0.05)
        return found


def builder(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "offload-builder"), *map(str, arguments)],
        capture_output=True, text=True, timeout=COMMAND_SECONDS,
    )  # fmt: skip


def test_gateway_and_node_run_from_toml_files_and_build(tmp_path: Path) -> None:
    gateway_address = f"127.0.0.1:{free_port()}"
    (tmp_path / "gateway.toml").write_text(
        f'listen = "{gateway_address}"\ndata_dir = "{tmp_path}/gateway"\n'
        'heartbeat_interval = "500ms"\n'
    )
    with Service(tmp_path / "g.log", "gateway", "--config", tmp_path / "gateway.toml") as gateway:
        admin_token = gateway.wait_for(r"^ofl_\S+")[0]
        created = builder(
            "token", "create", "one", "--role", "node", "--data-dir", tmp_path / "gateway"
        )
        assert created.returncode == 0, created.stderr
        (tmp_path / "token").write_text(created.stdout)
        node_address = f"127.0.0.1:{free_port()}"
        (tmp_path / "node.toml").write_text(
            f'gateway = "{gateway_address}"\ndata = "{tmp_path}/node"\nnode_id = "one"\n'
            f'token_file = "{tmp_path}/token"\nadvertise = ["{node_address}"]\nslots = 2\n'
        )
        with Service(
            tmp_path / "n.log", "node", "--config", tmp_path / "node.toml",
            OFFLOAD_NODE_LISTEN=node_address,
        ) as node:  # fmt: skip
            node.wait_for("gateway.attached")
            (tmp_path / "home").mkdir()
            member = Member(tmp_path / "home", {"OFFLOAD_TOKEN": admin_token})
            made = builder("project", "create", "web", "--data-dir", tmp_path / "gateway")
            assert made.returncode == 0, made.stderr
            (tmp_path / "c").mkdir()
            (tmp_path / "c" / "offload.toml").write_text(
                f'gateway = "https://{gateway_address}"\nproject = "web"\n'
            )
            context = make_context(tmp_path / "c", "RUN echo from-toml\n")
            result = member.build(context, cwd=context)
            assert result.returncode == 0, result.stderr
            status = member.run("offload", "status", cwd=context)
            assert re.search(r"^one +ready +\d/2 ", status.stdout, re.MULTILINE), status.stdout
            assert "web" in status.stdout
        deadline = time.monotonic() + 20
        while re.search(
            r"^one +ready", member.run("offload", "status", cwd=context).stdout, re.MULTILINE
        ):
            assert time.monotonic() < deadline, "the stopped node still counts as ready"
            time.sleep(0.2)


def test_wrong_configuration_names_file_key_and_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('gateway = "127.0.0.1:1"\nsolts = 2\n')
    result = builder("node", "--config", tmp_path / "node.toml")
    assert result.returncode == 3, result.stderr
    assert "node.toml" in result.stderr
    assert "'solts'" in result.stderr
    assert "slots" in result.stderr
    (tmp_path / "node.toml").write_text('gateway = "127.0.0.1:1"\nslots = "many"\n')
    result = builder("node", "--config", tmp_path / "node.toml")
    assert result.returncode == 3, result.stderr
    assert "slots" in result.stderr
    assert "Traceback" not in result.stderr


def test_node_without_a_token_says_how_to_get_one(tmp_path: Path) -> None:
    result = builder("node", "--gateway", "127.0.0.1:1", "--data", tmp_path / "node")
    assert result.returncode == 3, result.stderr
    assert "offload-builder token create --role node" in result.stderr


def test_tokens_are_listed_without_secrets_and_revoked(tmp_path: Path) -> None:
    data = ("--data-dir", tmp_path / "gateway")
    gateway_address = f"127.0.0.1:{free_port()}"
    with Service(tmp_path / "g.log", "gateway", "--listen", gateway_address, *data) as gateway:
        gateway.wait_for(r"^ofl_\S+")
        token = builder("token", "create", "carol", *data).stdout.strip()
        listed = builder("token", "list", *data).stdout
        assert "carol" in listed
        assert token.split("_")[2] not in listed
        (tmp_path / "home").mkdir()
        member = Member(tmp_path / "home", {})
        login = ("login", f"https://{gateway_address}", "--token", token)
        assert member.offload(*login).returncode == 0
        revoked = builder("token", "revoke", token.split("_")[1], *data)
        assert revoked.returncode == 0, revoked.stderr
        refused = member.offload("status")
        assert refused.returncode == 4, refused.stderr
        assert "revoked" in refused.stderr


def test_doctor_lists_parts_and_remedies() -> None:
    result = builder("doctor")
    assert result.returncode == 0, result.stdout
    for part in ("buildkitd", "runc", "setpriv", "minio"):
        assert re.search(rf"^ok +{part}", result.stdout, re.MULTILINE), result.stdout
    missing = subprocess.run(
        [str(BIN / "python"), "-m", "offload_builder.cli.entry", "doctor"],
        capture_output=True, text=True, timeout=60,
        env={"PATH": "/nowhere", "OFFLOAD_BUILDKITD": "/nowhere/buildkitd"},
    )  # fmt: skip
    assert missing.returncode == 1
    assert re.search(r"^MISSING +runc", missing.stdout, re.MULTILINE)
    assert "apt-get install runc" in missing.stdout

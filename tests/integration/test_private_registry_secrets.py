"""What steps, disks, logs and untrusted members see of logins at registries: nothing."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import node_service_pb2 as node_pb
from tests.fixtures.node import NodePool
from tests.fixtures.registry import PASSWORD, USER, DockerRegistry
from tests.fixtures.registrybuilds import build, write_registries
from tests.fixtures.tokenserver import IDENTITY, TokenServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
_ATTACK = r"""#!/bin/sh
exec 2>&1
set +e
echo == own process
env; cat /proc/*/environ /proc/*/cmdline; cat /proc/1/root/etc/passwd /proc/1/mountinfo
echo == files
grep -rl -e "$1" /etc /run /tmp /root /var /home /dev/shm
find / -xdev -name "*.sock" -o -xdev -name "config.json" -o -xdev -name "buildkitd.toml"
ls -la / /run /run/offload /run/secrets /root /proc/self/fd
echo == sockets
cat /proc/net/unix /proc/net/tcp
for hex in $(sed -n 's/^ *[0-9]*: [0-9A-F]*:\([0-9A-F]*\) [0-9A-F:]* 0A .*/\1/p' /proc/net/tcp); do
  port=$((0x$hex))
  echo "port $port"
  for path in v2/ v2/_catalog metrics debug/vars debug/pprof/cmdline debug/pprof/heap; do
    timeout 1 wget -q -S -T 1 -O - "http://127.0.0.1:$port/$path"
  done
done
echo == devices
timeout 1 grep -c -a "$1" /dev/mem /proc/kcore
echo attacked
"""


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "tokens") as server:
        yield server


@pytest.fixture
def registry(tmp_path: Path, tokens: TokenServer) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path / "registry", auth=tokens.auth) as running:
        yield running


@pytest.fixture
async def pool() -> AsyncIterator[NodePool]:
    async with NodePool() as running:
        yield running


def configure(folder: Path, host: str) -> Path:
    return write_registries(
        folder,
        host,
        "http = true",
        f'username = "{USER}"',
        'password_env = "POOL_PASSWORD"',
        'push = ["**"]',
    )


async def test_step_on_the_hosts_network_finds_no_login(
    pool, registry, tokens, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("POOL_PASSWORD", PASSWORD)
    host = registry.address
    await pool.start_node(registry_config=configure(tmp_path, host))
    seed = 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "/bin"]\n'
    for name in ("team/pool", "team/person"):
        logins = {host: ("", IDENTITY)} if name == "team/person" else {}
        built = await build(pool, seed, push=f"{host}/{name}:1", logins=logins)
        assert built.good, built.failure
    attack = (
        f"FROM {host}/team/person:1\nCOPY --from={host}/team/pool:1 /bin/busybox /other\n"
        f'COPY attack /attack\nRUN ["/bin/sh", "/attack", "{PASSWORD[:6]}"]\n'
    )
    built = await build(
        pool,
        attack,
        push=f"{host}/team/attacked:1",
        logins={host: ("", IDENTITY)},
        files={"attack": (_ATTACK.encode(), 0o755)},
    )
    assert built.good, built.failure
    printed = built.printed
    assert b"attacked" in printed
    port = host.rpartition(":")[2]
    # The step really is on the host's network, and has talked to the registry.
    assert f"port {port}".encode() in printed
    secrets = [PASSWORD, _BASIC, IDENTITY, *tokens.tokens()]
    assert len(tokens.tokens()) > 2
    for secret in secrets:
        assert secret.encode() not in printed
        # Neither in what the build says, nor on the node's disk, nor in its log.
        assert all(secret not in str(message) for message in built.person.seen)
        found = subprocess.run(
            ["grep", "-rlaF", "--", secret, str(pool.folder)], capture_output=True, text=True
        )
        assert found.stdout == "", found.stdout
    logged = "".join(capfd.readouterr())
    for secret in secrets:
        assert secret not in logged


async def test_daemon_does_not_know_the_variable_with_the_password(
    pool, registry, tmp_path, monkeypatch
):
    monkeypatch.setenv("POOL_PASSWORD", PASSWORD)
    agent = await pool.start_node(registry_config=configure(tmp_path, registry.address))
    built = await build(pool, "FROM scratch\nCOPY busybox /bin/busybox\n")
    assert built.good, built.failure
    runtime = await agent._projects.runtime("default")
    assert runtime._daemon._process is not None
    environment = Path(f"/proc/{runtime._daemon._process.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"POOL_PASSWORD" not in environment


async def test_untrusted_member_gets_nothing_by_the_pools_login(pool, registry, tokens, tmp_path):
    host = registry.address
    (tmp_path / "password").write_text(PASSWORD)
    login = [f'username = "{USER}"', f'password_file = "{tmp_path / "password"}"']
    for base_images in ("true", "false"):
        lines = ["http = true", *login, 'push = ["**"]', f"base_images = {base_images}"]
        await pool.start_node(base_images, registry_config=write_registries(tmp_path, host, *lines))
        seeded = await build(
            pool, "FROM scratch\nCOPY busybox /bin/busybox\n", push=f"{host}/team/base:1"
        )
        assert seeded.good, seeded.failure
        token = await pool.gateway.create_token(f"eve-{base_images}", identity_pb.ROLE_UNTRUSTED)
        eve = await pool.gateway.login(token)
        tokens.asked.clear()
        run = 'RUN ["/bin/busybox", "true"]\n'
        pulled = await build(pool, f"FROM {host}/team/base:1\n{run}", keys=eve)
        assert pulled.failure.kind == node_pb.Failure.KIND_REGISTRY_AUTH
        pushed = await build(
            pool,
            "FROM scratch\nCOPY busybox /bin/busybox\n",
            push=f"{host}/team/evil:1",
            keys=eve,
        )
        assert pushed.failure.kind == node_pb.Failure.KIND_REGISTRY_AUTH
        assert {item.user for item in tokens.asked} == {""}
        await pool.stop_node(base_images)


async def test_login_of_one_project_is_not_used_for_another(pool, registry, tokens, tmp_path):
    (tmp_path / "password").write_text(PASSWORD)
    login = [f'username = "{USER}"', f'password_file = "{tmp_path / "password"}"']
    host = registry.address
    for number, projects in enumerate(('["shop-*"]', '["def*"]')):
        lines = ["http = true", *login, 'push = ["**"]', f"projects = {projects}"]
        name = f"n{number}"
        await pool.start_node(name, registry_config=write_registries(tmp_path, host, *lines))
        built = await build(
            pool, "FROM scratch\nCOPY busybox /bin/busybox\n", push=f"{host}/team/app:1"
        )
        assert built.good is bool(number)
        await pool.stop_node(name)

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import pytest

from offload_builder.buildkit import DaemonExit, DaemonSettings, RegistrySettings, find_buildkitd
from offload_builder.buildkit.daemon_config import daemon_toml
from offload_builder.buildkit.daemon_exit import count_oom_kills
from offload_builder.buildkit.daemon_log import DaemonLog
from offload_core.errors import ConfigError


def test_the_configuration_file_says_what_the_settings_say(tmp_path):
    settings = DaemonSettings(
        root=tmp_path / 'with "quotes" ü',
        registries={
            "localhost:5000": RegistrySettings(http=True),
            "docker.io": RegistrySettings(mirrors=["mirror:1"], ca_files=[Path("/ca.pem")]),
        },
        entitlements=["network.host"],
        gc_max_used_bytes=10**10,
        max_parallelism=3,
        nameservers=["10.0.0.1"],
    )
    text = daemon_toml(settings, Path("/run/x/bk.sock"), Path("/usr/sbin/runc"))
    config = tomllib.loads(text)
    assert config["root"] == str(settings.root)
    assert config["insecure-entitlements"] == ["network.host"]
    assert config["grpc"]["address"] == ["unix:///run/x/bk.sock"]
    assert config["otel"]["socketPath"] == "/run/x/otel.sock"
    worker = config["worker"]["oci"]
    assert (worker["maxUsedSpace"], worker["max-parallelism"]) == (10**10, 3)
    assert "reservedSpace" not in worker
    assert config["worker"]["containerd"]["enabled"] is False
    assert config["registry"]["localhost:5000"]["http"] is True
    assert config["registry"]["docker.io"]["mirrors"] == ["mirror:1"]
    assert config["dns"]["nameservers"] == ["10.0.0.1"]


def test_a_missing_program_is_an_error_that_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OFFLOAD_BUILDKITD", raising=False)
    with pytest.raises(ConfigError) as caught:
        find_buildkitd(None, [tmp_path])
    assert "OFFLOAD_BUILDKITD" in caught.value.hint
    with pytest.raises(ConfigError, match="configuration names"):
        find_buildkitd(tmp_path / "no")


def test_the_program_is_searched_in_order(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("configured", "variable", "path", "extra")]
    for place in places:
        place.mkdir()
        (place / "buildkitd").write_text("#!/bin/sh\n")
        (place / "buildkitd").chmod(0o755)
    configured, variable, path, extra = (place / "buildkitd" for place in places)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setenv("OFFLOAD_BUILDKITD", str(variable))
    assert find_buildkitd(configured, [extra.parent]) == configured
    assert find_buildkitd(None, [extra.parent]) == variable
    monkeypatch.delenv("OFFLOAD_BUILDKITD")
    assert find_buildkitd(None, [extra.parent]) == path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_buildkitd(None, [extra.parent]) == extra


async def test_the_log_is_rotated_and_the_tail_has_no_stack_traces(tmp_path):
    log = DaemonLog(tmp_path / "d.log", max_bytes=5000)
    pipe = asyncio.StreamReader()
    for number in range(300):
        pipe.feed_data(f"time={number} msg=x\n".encode() * 2)
    pipe.feed_data(b"buildkitd: no\nmain.main\n\t/x/main.go:5\nruntime.goexit\n\t/y.s:1")
    pipe.feed_eof()
    reading = asyncio.create_task(log.copy(pipe))
    await reading
    assert log.tail(2) == "time=299 msg=x\nbuildkitd: no"
    assert (tmp_path / "d.log.1").exists() or (tmp_path / "d.log").stat().st_size > 0


async def test_log_files_stay_small(tmp_path):
    log = DaemonLog(tmp_path / "d.log", max_bytes=1000)
    pipe = asyncio.StreamReader()
    reading = asyncio.create_task(log.copy(pipe))
    for _ in range(20):
        pipe.feed_data(b"x" * 299 + b"\n")
        await asyncio.sleep(0)
    pipe.feed_eof()
    await reading
    assert (tmp_path / "d.log").stat().st_size <= 1000
    assert (tmp_path / "d.log.1").stat().st_size <= 1000


async def test_a_log_that_is_flooded_is_read_slowly(tmp_path):
    log = DaemonLog(tmp_path / "d.log", bytes_per_second=1)
    pipe = asyncio.StreamReader()
    pipe.feed_data((b"x" * 1023 + b"\n") * 3000)
    pipe.feed_eof()
    reading = asyncio.create_task(log.copy(pipe))
    while not (tmp_path / "d.log").exists() or (tmp_path / "d.log").stat().st_size < 1 << 20:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not reading.done()
    assert (tmp_path / "d.log").stat().st_size < 2 << 20
    reading.cancel()
    await asyncio.wait((reading,))


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (DaemonExit(None, 9, False, False, ""), "buildkitd was killed by SIGKILL"),
        (DaemonExit(None, 9, False, True, ""), "killed by SIGKILL as memory ran out"),
        (DaemonExit(1, None, False, False, "a\nbuildkitd: no disk"), "with code 1: no disk"),
        (DaemonExit(0, None, True, False, ""), "was stopped"),
    ],
)
def test_an_end_is_described(ended, text):
    assert text in ended.describe()


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("3:cpu:/c\n2:name=systemd:/\n1:memory:/a/b\n0::/\n", "memory/a/b/memory.oom_control"),
        ("0::/x.slice/y\n", "x.slice/y/memory.events.local"),
    ],
)
def test_only_kills_for_memory_in_the_own_control_group_count(tmp_path, groups, file):
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/cgroup").write_text(groups)
    assert count_oom_kills(7, root=tmp_path) == 0
    events = tmp_path / "sys/fs/cgroup" / file
    events.parent.mkdir(parents=True)
    events.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\noom_group_kill 1\n")
    (tmp_path / "proc/vmstat").write_text("oom_kill 50\n")
    assert count_oom_kills(7, root=tmp_path) == 3
    assert count_oom_kills(8, root=tmp_path) == 0

"""Parts of `offload-builder up` that need no pool, and the supervision of its children."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from offload_builder.cli import poolconfig
from offload_builder.cli.up import ObjectStorage, parse_s3_url, wait_for_port
from offload_builder.datalock import DataLock
from offload_builder.provider.process import (
    MINIO_VARIABLE,
    ProcessSpec,
    SupervisedProcess,
    find_minio,
    node_process,
    stop_all,
)
from offload_core.errors import ConfigError

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "planted-secret"}


@pytest.mark.parametrize(
    ("url", "endpoint", "bucket", "prefix"),
    [
        ("https://s3.example.com/buck", "https://s3.example.com", "buck", ""),
        ("http://127.0.0.1:9000/buck/", "http://127.0.0.1:9000", "buck", ""),
        ("http://[::1]:9000/buck/some/prefix", "http://[::1]:9000", "buck", "some/prefix"),
        ("https://h/buck/with%20space", "https://h", "buck", "with space"),
    ],
)
def test_s3_urls(url, endpoint, bucket, prefix):
    found = parse_s3_url(url, KEYS)
    assert found == ObjectStorage(endpoint, bucket, "id", "planted-secret", prefix)
    assert "planted-secret" not in repr(found)
    assert found.node_settings()["s3_secret_key"] == "planted-secret"


@pytest.mark.parametrize(
    "url",
    ["", "bucket", "s3://bucket", "https://host", "https:///bucket", "https://host/", "ftp://h/b",
     "https://h:port/b", "https://h:99999/b", "https://[::1/b"],
)  # fmt: skip
def test_what_is_no_s3_url_is_said(url):
    with pytest.raises(ConfigError, match="is not an S3 URL"):
        parse_s3_url(url, KEYS)


def test_bucket_that_cannot_be_is_said():
    with pytest.raises(ConfigError, match='"Bucket" cannot be the name of a bucket'):
        parse_s3_url("https://host/Bucket", KEYS)


def test_keys_do_not_belong_into_the_url():
    with pytest.raises(ConfigError, match="do not belong into the S3 URL") as caught:
        parse_s3_url("https://id:planted-secret@host/b", KEYS)
    assert "planted-secret" not in caught.value.message


def test_temporary_keys_and_the_region_reach_the_nodes():
    environment = KEYS | {"AWS_SESSION_TOKEN": "planted-token", "AWS_REGION": "eu-central-1"}
    found = parse_s3_url("https://host/buck", environment)
    assert "planted-token" not in repr(found)
    options = poolconfig.node_options(
        None, {}, slots=None, log_level=None, storage=found.node_settings()
    )
    store = poolconfig.node_config(None, {}, options).shared_store()
    assert (store.session_token, store.region) == ("planted-token", "eu-central-1")


def pool_gateway(file, environment, **options):
    given = {"listen": None, "log_level": None, "protected_branches": ()} | options
    return poolconfig.gateway_config(file, environment, Path("/d/gateway"), **given)


def test_everything_of_a_gateway_can_be_set_for_up(tmp_path):
    found = pool_gateway(None, {})
    assert (found.listen, found.log_level, found.protected_branches) == (
        "127.0.0.1:7443", "warning", (),
    )  # fmt: skip
    file = tmp_path / "gateway.toml"
    file.write_text('listen = "10.0.0.5:1"\nprotected_branches = ["main"]\nslot_hold = "9s"\n')
    found = pool_gateway(file, {"OFFLOAD_GATEWAY_LOG_LEVEL": "debug"})
    assert (found.listen, found.log_level, found.protected_branches, found.slot_hold) == (
        "10.0.0.5:1", "debug", ("main",), 9.0,
    )  # fmt: skip
    found = pool_gateway(file, {}, listen="h:2", protected_branches=("release/*", "main"))
    assert (found.listen, found.protected_branches) == ("h:2", ("release/*", "main"))


def test_everything_of_a_node_can_be_set_for_up(tmp_path):
    file = tmp_path / "node.toml"
    file.write_text('slots = 9\ns3_endpoint = "https://s3.example"\ns3_credentials = "aws"\n')
    options = poolconfig.node_options(file, {}, slots=None, log_level=None, storage={})
    assert options == {"log_level": "warning", "isolation": "none"}
    file.write_text(file.read_text() + 'isolation = "netns"\n')
    told = poolconfig.node_options(file, {}, slots=None, log_level=None, storage={})
    assert poolconfig.node_config(file, {}, told).isolation == "netns"
    found = poolconfig.node_config(file, {"OFFLOAD_NODE_BLOBS_KEEP": "1GB"}, options)
    assert (found.slots, found.s3_credentials, found.blobs_keep) == (9, "aws", 10**9)
    options = poolconfig.node_options(file, {}, slots=2, log_level="info", storage={})
    assert poolconfig.node_config(file, {}, options).slots == 2
    spec = node_process("n", options, Path("log"), 1.0, config_file=file)
    assert list(spec.command[-2:]) == ["--config", str(file)]


def test_what_up_decides_cannot_be_set_and_caches_exclude_each_other(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text('data_dir = "/elsewhere"\n')
    with pytest.raises(ConfigError, match="leave data_dir out"):
        pool_gateway(file, {})
    file.write_text('advertise = ["h:1"]\n')
    with pytest.raises(ConfigError, match="leave advertise out"):
        poolconfig.node_options(file, {}, slots=None, log_level=None, storage={})
    file.write_text('s3_endpoint = "https://s3.example"\n')
    with pytest.raises(ConfigError, match="names an s3_endpoint"):
        poolconfig.node_options(
            file, {}, slots=None, log_level=None, storage={"s3_endpoint": "http://h"}
        )


@pytest.mark.parametrize("missing", KEYS)
def test_missing_keys_are_named(missing):
    environment = {key: value for key, value in KEYS.items() if key != missing}
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        parse_s3_url("https://host/b", environment)


def test_node_gets_its_settings_in_the_environment_not_on_the_command_line():
    spec = node_process("n", {"token": "planted", "gateway": "g:1"}, Path("log"), 1.0)
    assert spec.environment == {"OFFLOAD_NODE_TOKEN": "planted", "OFFLOAD_NODE_GATEWAY": "g:1"}
    assert "planted" not in " ".join(spec.command)


def test_minio_that_is_missing_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("offload_builder.provider.process.tools_directory", lambda: tmp_path)
    with pytest.raises(ConfigError, match=f"make tools.*{MINIO_VARIABLE}.*--s3 URL"):
        find_minio()
    program = tmp_path / "minio"
    program.touch(0o755)
    assert find_minio() == program


async def test_second_user_of_a_data_directory_is_refused_with_a_sentence(tmp_path):
    data = tmp_path / "data"
    async with DataLock(data, "offload-builder up"):
        with pytest.raises(
            ConfigError,
            match=rf"{data} is in use by process {os.getpid()}; stop it first, or give "
            "offload-builder up another data directory",
        ):
            await DataLock(data, "offload-builder up").__aenter__()
        waiting = asyncio.ensure_future(DataLock(data, "x", patience=5).__aenter__())
        await asyncio.sleep(0.15)
        assert not waiting.done()
    lock = await waiting
    await lock.__aexit__()


async def test_data_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot use the data directory"):
        await DataLock(tmp_path / "file" / "data", "x").__aenter__()


def child(tmp_path: Path, code: str, name: str = "child", stop_seconds: float = 5.0) -> ProcessSpec:
    return ProcessSpec(
        name, [sys.executable, "-c", code], {}, tmp_path / f"{name}.log", stop_seconds
    )


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_child_that_dies_is_started_again(tmp_path):
    async with SupervisedProcess(child(tmp_path, "import time; time.sleep(60)")) as process:
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: process.pid not in (None, first))
        assert process.deaths == 1
        second = process.pid
    assert process.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


async def test_child_that_ends_at_once_is_counted_and_its_last_words_kept(tmp_path):
    spec = child(tmp_path, "print('x' * 100000); print('the cause'); raise SystemExit(3)")
    async with SupervisedProcess(spec) as process:
        await until(lambda: process.deaths == 1)
        assert process.log_tail(1) == "the cause"
        assert process.log_tail().endswith("the cause")


async def test_child_that_does_not_listen_is_reported_before_the_time_is_over(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("offload_builder.provider.process.RESTART_SECONDS", (0.01,))
    spec = child(tmp_path, "raise SystemExit('port in use')", "minio")
    async with SupervisedProcess(spec) as process:
        with pytest.raises(ConfigError, match="minio does not start; its last words: port in use"):
            await wait_for_port("127.0.0.1:1", process)


async def test_deaf_child_and_what_it_left_are_killed(tmp_path):
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(other.pid, flush=True); time.sleep(60)"
    )
    async with SupervisedProcess(child(tmp_path, code, stop_seconds=0.2)) as process:
        await until(lambda: process.log_tail(1).isdigit())
        grandchild = int(process.log_tail(1))
    await until(lambda: not _alive(grandchild))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_children_are_stopped_side_by_side(tmp_path):
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit()))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(1)"
    )
    processes = [SupervisedProcess(child(tmp_path, slow, f"c{n}")) for n in range(4)]
    for process in processes:
        await process.__aenter__()
    for process in processes:
        await until(lambda process=process: process.log_tail(1) == "ready")
    began = asyncio.get_running_loop().time()
    await stop_all(processes)
    assert asyncio.get_running_loop().time() - began < 1.5


async def test_program_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    spec = ProcessSpec("node", ["/nowhere/python"], {}, tmp_path / "log", 1.0)
    with pytest.raises(ConfigError, match="cannot start node"):
        await SupervisedProcess(spec).__aenter__()

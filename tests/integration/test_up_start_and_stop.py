"""`offload-builder up`: starting, stopping, starting again, and children that die."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import BIN, Pool


def up(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "offload-builder", "up", "--listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def processes_with(text: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in environment + command:
                found.append(command.replace(b"\0", b" ").decode("utf-8", "replace"))
    return found


def test_second_up_on_the_same_data_is_refused_and_reuse_keeps_token_and_nodes(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with Pool(2, data=data) as pool:
        token = pool.admin_token
        assert len(re.findall(r"ofl_\S+", pool.output())) == 1
        second = up("--data", data)
        output, errors = second.communicate(timeout=30)
        assert second.returncode == 3
        assert errors.startswith(f"ERROR: {data} is in use by process {pool.pid}; stop it first")
        assert "Traceback" not in errors + output
        # The first one does not mind, and a node that dies comes back.
        os.kill(pool.node_pid("node-1"), signal.SIGKILL)
        member = pool.member()
        result = member.build(make_context(tmp_path / "c", "RUN echo alive\n"))
        assert result.returncode == 0, result.stderr
        assert pool.stop() == 0
        pool.start()
        assert "ofl_" not in pool.output()
        assert f"token create NAME --role member --data-dir {data}/gateway" in pool.output()
        assert pool.member(token).build(tmp_path / "c").returncode == 0
        assert pool.stop() == 0
    assert token not in "".join(path.read_text("utf-8", "replace") for path in data.rglob("*.log"))
    assert processes_with(str(data)) == []


def test_ctrl_c_during_start_up_stops_everything(tmp_path):
    for number, pause in enumerate((0.3, 0.9)):
        data = tmp_path / f"d{number}"
        starting = up("--data", data, "--nodes", "2", "--minio")
        time.sleep(pause)
        starting.send_signal(signal.SIGINT)
        _, errors = starting.communicate(timeout=30)
        # Before our handler is there, Python ends by the signal itself.
        assert starting.returncode in (0, 1, 130, -signal.SIGINT), errors
        assert processes_with(str(data)) == []


def test_ctrl_c_while_a_node_hangs_shows_the_token_that_was_made(tmp_path):
    data = tmp_path / "data"
    (data / "node-1").mkdir(parents=True)
    with (data / "node-1" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = up("--data", data)
        deadline = time.monotonic() + 20
        while not processes_with(f"OFFLOAD_NODE_DATA={data}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        starting.send_signal(signal.SIGINT)
        output, errors = starting.communicate(timeout=30)
    assert starting.returncode == 0, errors
    assert re.search(r"did not start. Its first token, shown only now: ofl_\S+", output)
    assert processes_with(str(data)) == []


def test_node_that_cannot_start_is_reported_with_its_last_words(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "node-1").write_text("a file where a directory belongs")
    broken = up("--data", data)
    output, errors = broken.communicate(timeout=50)
    assert broken.returncode == 3
    assert re.fullmatch(r"ERROR: .*node-1.*\n", errors)
    assert "ofl_" in output
    assert processes_with(str(data)) == []


def test_files_and_protected_branches_reach_the_whole_pool(tmp_path):
    gateway, node = tmp_path / "gateway.toml", tmp_path / "node.toml"
    gateway.write_text('default_branches = ["trunk"]\n')
    node.write_text('slots = 3\nblobs_keep = "7GB"\n')
    context = make_context(tmp_path / "c", "RUN echo hello\n")
    with Pool(
        1, "--gateway-config", str(gateway), "--node-config", str(node),
        "--protected-branch", "trunk", "--protected-branch", "release/*",
    ) as pool:  # fmt: skip
        member = pool.member(pool.create_token("ann"), OFFLOAD_BRANCH="release/1")
        assert "/3" in member.offload("status").stdout
        assert "7GB" in member.offload("cache", "usage").stdout
        for branch in ("release/1", "trunk"):
            refused = member.build(context, "--cache-scope", branch)
            assert refused.returncode != 0
            assert f'write the protected cache scope "{branch}"' in refused.stderr
        assert member.build(context).returncode == 0
        refused = member.offload("cache", "prune", "--force")
        assert 'write the protected cache scope "release/1"' in refused.stderr

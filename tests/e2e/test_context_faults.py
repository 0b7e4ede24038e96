"""What goes wrong on the way of a build context: nothing is mixed, lost, or sent twice."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.helper import HelperUser
from tests.fixtures.pool import wait_for_text
from tests.fixtures.relayedpool import RelayedPool
from tests.fixtures.trees import (
    DATA_DOCKERFILE,
    DATA_TREE_BYTES,
    data_tree,
    noise,
    of_directory,
    of_tar,
    source_tree,
    write_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

LOST_BYTES = 4 << 20
CALLS_BYTES = 128 << 10
"""Names of pages and pieces, and handshakes, also those of coming back."""
"""On the way when a connection breaks, at most."""


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    """One node behind a relay that cuts and throttles."""
    with RelayedPool() as running:
        yield running


@pytest.fixture
def member(relayed: RelayedPool, request: pytest.FixtureRequest) -> Iterator[Member]:
    """Somebody who is logged in; the relay is at rest before and after."""
    relayed.relay.reset()
    yield relayed.member()
    relayed.relay.reset()


def sentence(result: subprocess.CompletedProcess[str], code: int, *expected: str) -> None:
    """Check exit code and the one sentence."""
    assert result.returncode == code, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert len(re.findall(r"^ERROR: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    for text in expected:
        assert text in result.stderr, result.stderr


@pytest.mark.parametrize("seed", range(7))
def test_cut_uploads_go_on_where_they_were(
    relayed: RelayedPool, member: Member, tmp_path: Path, seed: int
) -> None:
    context = data_tree(tmp_path / "c", ("cut", seed))
    size = DATA_TREE_BYTES
    dice = random.Random(seed)
    points = sorted(dice.randrange(60_000, size) for _ in range(3))
    relayed.relay.cut_after(*points)
    result = member.build("-o", f"type=tar,dest={tmp_path}/out.tar", context)
    assert result.returncode == 0, (points, result.stderr)
    assert relayed.relay.cuts == 3, points
    assert relayed.relay.up_bytes <= size + 3 * LOST_BYTES, points
    assert of_tar(tmp_path / "out.tar") == of_directory(context / "data"), points
    if seed == 0:
        # An undisturbed build of the same tree, by a BuildKit that has never seen it.
        relayed.create_project("undisturbed")
        result = member.build(
            "--project", "undisturbed", "-o", f"type=tar,dest={tmp_path}/calm.tar", context
        )
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "out.tar").read_bytes() == (tmp_path / "calm.tar").read_bytes()


def test_cut_upload_goes_on_in_the_resident_helper(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    small = write_files(tmp_path / "s", {"data": "helped", "Dockerfile": DATA_DOCKERFILE})
    context = data_tree(tmp_path / "c", "helped")
    with HelperUser(member) as user:
        assert member.build(small).returncode == 0
        user.wait()
        relayed.relay.reset()
        relayed.relay.cut_after(9_000_000)
        result = user.build("-o", f"type=tar,dest={tmp_path}/out.tar", context)
        assert result.returncode == 0, result.stderr
        assert relayed.relay.cuts == 1
        assert relayed.relay.up_bytes <= DATA_TREE_BYTES + LOST_BYTES + CALLS_BYTES
        assert of_tar(tmp_path / "out.tar") == of_directory(context / "data")


def test_node_that_cannot_be_reached_any_more_is_one_sentence(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "gone")
    target = relayed.relay.target
    relayed.relay.cut_after(3_000_000)
    relayed.relay.rate = 20e6
    member.environment["OFFLOAD_RECONNECT_SECONDS"] = "5"
    building = member.start(context)
    try:
        while relayed.relay.pending_cuts:
            assert building.poll() is None
            time.sleep(0.01)
        relayed.relay.target = "127.0.0.1:1"
        _, errors = building.communicate(timeout=60)
    finally:
        relayed.relay.target = target
    assert building.returncode == 7, errors
    assert "Traceback" not in errors
    assert len(re.findall(r"^ERROR: ", errors, re.MULTILINE)) == 1, errors


def test_connection_lost_while_results_are_fetched_leaves_no_half_result(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "fetched")
    target = tmp_path / "out.tar"
    target.write_text("of an earlier build")
    building = member.start("-o", f"type=tar,dest={target}", context)
    while relayed.relay.down_bytes < 4_000_000:
        assert building.poll() is None, building.communicate()
    relayed.relay.cut()
    _, errors = building.communicate(timeout=60)
    assert building.returncode == 0, errors
    assert of_tar(target) == of_directory(context / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out.tar"]
    relayed.relay.reset()
    result = member.build("-o", f"type=tar,dest={target}", context)
    assert result.returncode == 0, result.stderr
    assert of_tar(target) == of_directory(context / "data")
    assert relayed.relay.up_bytes < 1_000_000


def test_output_that_went_into_a_pipe_is_not_written_twice(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "piped")
    relayed.relay.rate = 10e6
    with (tmp_path / "errors").open("w") as errors:
        building = subprocess.Popen(
            member.command("offload-build", "--progress", "plain", "-o", "-", context),
            stdout=subprocess.PIPE, stderr=errors, env=member.environment, cwd=member.home,
        )  # fmt: skip
        with building:
            assert building.stdout is not None
            # Part of the archive is in the pipe.
            assert len(building.stdout.read(2_000_000)) == 2_000_000
            relayed.relay.cut()
            rest = building.stdout.read()
    shown = (tmp_path / "errors").read_text()
    assert building.returncode == 7, shown
    assert 2_000_000 + len(rest) < DATA_TREE_BYTES
    assert "a part of its output is written already; run it again" in shown
    assert len(re.findall(r"^ERROR: ", shown, re.MULTILINE)) == 1, shown


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(noise("overwritten", path.stat().st_size))


def forge(path: Path) -> None:
    """Change the content and put the time back."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(path: Path) -> None:
    """Put another file in its place, as editors do."""
    other = path.with_name("other")
    other.write_bytes(noise("exchanged", path.stat().st_size))
    other.rename(path)


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], None]] = {
    "grown": grow,
    "truncated": truncate,
    "overwritten": overwrite,
    "forged": forge,
    "exchanged": exchange,
    "removed": lambda path: path.unlink(),
    "directory": to_directory,
}


WHOLE, PIECES = 300_000, 6_000_000


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (WHOLE, "grown"),
        (WHOLE, "forged"),
        (WHOLE, "exchanged"),
        (WHOLE, "removed"),
        (PIECES, "truncated"),
        (PIECES, "overwritten"),
        (PIECES, "forged"),
        (PIECES, "directory"),
    ],
)
def test_file_that_changes_before_it_is_sent_is_named(
    relayed: RelayedPool, member: Member, tmp_path: Path, change: str, size: int
) -> None:
    # More than the client reads ahead and has under way.
    files = {f"data/a{number}": noise((change, size, number), 1_500_000) for number in range(16)}
    files["data/zz"] = noise((change, size), size)
    context = write_files(tmp_path / "c", {**files, "Dockerfile": DATA_DOCKERFILE})
    relayed.relay.rate = 8e6
    building = member.start("-o", f"type=tar,dest={tmp_path}/out.tar", context)
    while relayed.relay.up_bytes < 1_000_000:
        assert building.poll() is None, building.communicate()
        time.sleep(0.01)
    CHANGES[change](context / "data/zz")
    relayed.relay.rate = None
    _, errors = building.communicate(timeout=60)
    if building.returncode == 0:
        # It had been read before; then it is as it was.
        digest = hashlib.sha256(files["data/zz"]).hexdigest()
        assert of_tar(tmp_path / "out.tar")["zz"].sha256 == digest
    else:
        assert building.returncode == 10, errors
        assert "Traceback" not in errors
        (line,) = re.findall(r"^ERROR: .*", errors, re.MULTILINE)
        assert '"data/zz"' in line, errors
    relayed.relay.reset()
    # Nothing wrong was stored: the next build is right.
    if (context / "data/zz").is_file():
        result = member.build("-o", f"type=tar,dest={tmp_path}/next.tar", context)
        assert result.returncode == 0, result.stderr
        assert of_tar(tmp_path / "next.tar") == of_directory(context / "data")


@pytest.mark.parametrize("seed", range(4))
def test_file_that_changes_at_any_moment_is_old_or_new_or_named(
    relayed: RelayedPool, member: Member, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    context = source_tree(tmp_path / "c", 1_500, ("moment", seed))
    victim = context / f"src/part{dice.randrange(30):03}/changed"
    name = str(victim.relative_to(context))
    old, new = noise(("old", seed), 5_000_000), noise(("new", seed), 5_000_000)
    victim.write_bytes(old)
    building = member.start("-o", f"type=tar,dest={tmp_path}/out.tar", context)
    time.sleep(dice.uniform(0.25, 0.9))
    if building.poll() is None:
        building.send_signal(signal.SIGSTOP)
    with victim.open("r+b") as file:
        file.write(new[: dice.choice([100, 2_500_000, 5_000_000])])
    partly = victim.read_bytes()
    building.send_signal(signal.SIGCONT)
    _, errors = building.communicate(timeout=60)
    if building.returncode == 0:
        found = of_tar(tmp_path / "out.tar")[name].sha256
        assert found in (hashlib.sha256(old).hexdigest(), hashlib.sha256(partly).hexdigest())
    else:
        assert building.returncode == 10, errors
        assert f'"{name}"' in errors, errors
    result = member.build("-o", f"type=tar,dest={tmp_path}/next.tar", context)
    assert result.returncode == 0, result.stderr
    assert of_tar(tmp_path / "next.tar")[name].sha256 == hashlib.sha256(partly).hexdigest()


def test_interrupted_upload_ends_at_once_and_the_next_sends_the_rest(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "interrupted")
    relayed.relay.rate = 6e6
    building = member.start(context)
    while relayed.relay.up_bytes < 14_000_000:
        assert building.poll() is None, building.communicate()
        time.sleep(0.01)
    began = time.monotonic()
    building.send_signal(signal.SIGINT)
    _, errors = building.communicate(timeout=30)
    assert time.monotonic() - began < 2.0
    assert building.returncode == 130, errors
    assert errors.splitlines()[-1] == "ERROR: canceled"
    member.wait_state("canceled")
    sent = relayed.relay.up_bytes
    relayed.relay.reset()
    result = member.build("-o", f"type=tar,dest={tmp_path}/out.tar", context)
    assert result.returncode == 0, result.stderr
    assert relayed.relay.up_bytes <= DATA_TREE_BYTES - sent + LOST_BYTES
    assert of_tar(tmp_path / "out.tar") == of_directory(context / "data")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Put a small file system at a directory."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_of_the_node_is_one_sentence(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    relayed.create_project("full")
    context = data_tree(tmp_path / "c", "full")
    project = ("--project", "full")
    with small_disk(relayed.folder / "node/projects/full/context", 16):
        sentence(member.build(*project, context), 6, "disk of the node is full")
        small = write_files(
            tmp_path / "s", {"data/one": noise("fits", 100_000), "Dockerfile": DATA_DOCKERFILE}
        )
        result = member.build(*project, "-o", f"type=tar,dest={tmp_path}/out.tar", small)
        assert result.returncode == 0, result.stderr
        assert of_tar(tmp_path / "out.tar") == of_directory(small / "data")


def test_progress_tells_of_the_new_connection(
    relayed: RelayedPool, member: Member, tmp_path: Path
) -> None:
    context = data_tree(tmp_path / "c", "told")
    relayed.relay.cut_after(5_000_000)
    building = member.start(context)
    wait_for_text(building, "connection")
    building.communicate(timeout=60)
    assert building.returncode == 0

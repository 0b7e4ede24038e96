"""The build context travels by content: what was ever sent is not sent again, and is exact."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import Pool, wait_for_text
from tests.fixtures.relayedpool import RelayedPool
from tests.fixtures.trees import (
    noise,
    of_directory,
    of_tar,
    source_tree,
    write_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member

# Trees without a repository share BuildKit's copy by name: "app" is the known tree in all tests.
FILES = 3_000
NAMES_BYTES = 500_000
"""What a build may send when no content is new: names and digests, and opening connections."""


@pytest.fixture(scope="module")
def relayed() -> Iterator[RelayedPool]:
    """One node behind a relay that counts."""
    with RelayedPool() as running:
        yield running


def build(member: Member, *arguments: str | Path) -> dict[str, Any]:
    """Build, and return the numbers of the build."""
    result = member.build(*arguments)
    assert result.returncode == 0, result.stderr
    stats: dict[str, Any] = member.wait_state("succeeded")["stats"]
    return stats


def buildkit_bytes(log: str) -> float:
    """Return what BuildKit says that it has got of the context."""
    found = re.findall(r"^#\d+ transferring context: ([\d.]+)(k?M?B)\b", log, re.MULTILINE)
    return max(float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit] for number, unit in found)


def wait_cached(member: Member) -> None:
    """Wait until no build writes its cache any more."""
    deadline = time.monotonic() + 60
    while any(build["cache_state"] == "pending" for build in member.builds()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def clone(source: Path, target: Path) -> Path:
    """Copy files as a fresh checkout does: with new times."""
    shutil.copytree(source, target, symlinks=True, copy_function=shutil.copyfile)
    return target


@pytest.fixture(scope="module")
def known_tree(relayed: RelayedPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that a member of the project has built."""
    tree = source_tree(tmp_path_factory.mktemp("first") / "app", FILES, "known")
    stats = build(relayed.member(), tree)
    assert stats["context_files"] == FILES
    assert stats["context_sent_bytes"] == stats["context_bytes"] > 0
    return tree


@pytest.mark.parametrize("who", ["clone", "other-directory", "teammate", "pipeline"])
def test_known_tree_from_elsewhere_sends_names_only(
    relayed: RelayedPool, known_tree: Path, tmp_path: Path, who: str
) -> None:
    if who == "pipeline":
        member = relayed.pipeline(relayed.create_token(who, "ci"))
    else:
        member = relayed.member(relayed.create_token(who) if who == "teammate" else None)
    tree = clone(known_tree, tmp_path / ("renamed" if who == "other-directory" else "app"))
    # A build that still writes its cache has BuildKit's copy; the next one would get another.
    wait_cached(member)
    relayed.relay.reset()
    result = member.build("-t", "app", tree)
    sent = relayed.relay.up_bytes
    assert result.returncode == 0, result.stderr
    stats = member.wait_state("succeeded")["stats"]
    assert stats["context_files"] == FILES
    assert stats["context_sent_bytes"] == 0
    assert stats["context_wire_bytes"] == 0
    assert stats["steps_cached"] == stats["steps_total"] > 0
    assert sent <= NAMES_BYTES
    # Nor does the node copy the tree again: BuildKit is told names and asks for nothing.
    assert buildkit_bytes(result.stderr) < stats["context_bytes"] / 4
    if who == "pipeline":
        assert list(member.home.rglob("*")) == []


def test_one_changed_file_sends_that_file_only(
    relayed: RelayedPool, known_tree: Path, tmp_path: Path
) -> None:
    member = relayed.member()
    tree = clone(known_tree, tmp_path / "app")
    changed = tree / "src/part030/file01500.txt"
    changed.write_bytes(noise("changed", 20_000))
    relayed.relay.reset()
    result = member.build("-o", f"type=tar,dest={tmp_path}/out.tar", tree)
    assert relayed.relay.up_bytes <= 20_000 + 300_000
    assert result.returncode == 0, result.stderr
    stats = member.wait_state("succeeded")["stats"]
    assert stats["context_sent_bytes"] == 20_000
    found = of_tar(tmp_path / "out.tar")
    assert found.pop("src").kind == "directory"
    assert {name.removeprefix("src/"): node for name, node in found.items()} == of_directory(
        tree / "src"
    )


def test_new_and_renamed_files_send_new_content_only(
    relayed: RelayedPool, known_tree: Path, tmp_path: Path
) -> None:
    member = relayed.member()
    tree = clone(known_tree, tmp_path / "app")
    (tree / "src/part010").rename(tree / "src/moved")
    (tree / "src/part020/file01000.txt").rename(tree / "src/part000/taken")
    (tree / "src/part030/file01500.txt").unlink()
    (tree / "src/new").write_text("new")
    assert build(member, tree)["context_sent_bytes"] == 3


def test_second_dockerfile_and_target_of_a_tree_send_nothing(
    relayed: RelayedPool, known_tree: Path, tmp_path: Path
) -> None:
    member = relayed.member()
    tree = clone(known_tree, tmp_path / "app")
    (tree / "Dockerfile").write_text(
        "FROM scratch AS one\nCOPY src/part000 /a\nFROM scratch AS two\nCOPY src/part001 /b\n"
    )
    (tree / "other.Dockerfile").write_text("FROM scratch\nCOPY src/part002 src/part003 /c/\n")
    for arguments in (["--target", "one"], ["--target", "two"], ["-f", tree / "other.Dockerfile"]):
        stats = build(member, *arguments, tree)
        assert stats["context_sent_bytes"] == 0
        assert stats["context_files"] in (50, 100)


def test_digests_alone_give_no_content_of_another_project(
    relayed: RelayedPool, tmp_path: Path
) -> None:
    member = relayed.member()
    context = write_files(
        tmp_path / "c",
        {"Dockerfile": "FROM scratch\nCOPY data /data\n", "data": noise("private", 100_000)},
    )
    assert build(member, context)["context_sent_bytes"] == 100_000
    relayed.create_project("other")
    assert build(member, "--project", "other", context)["context_sent_bytes"] == 100_000


def test_change_inside_a_large_file_sends_the_pieces_around_it(
    relayed: RelayedPool, tmp_path: Path
) -> None:
    member = relayed.member()
    context = make_context(tmp_path / "c", "COPY large /large\nRUN sha256sum /large\n")
    data = bytearray(noise("large", 64 << 20))
    large = context / "large"
    large.write_bytes(data)
    assert build(member, context)["context_sent_bytes"] >= len(data)
    data[30 << 20 : 31 << 20] = noise("middle", 1 << 20)
    for step in ("overwritten", "inserted"):
        if step == "inserted":
            data[5_000_000:5_000_000] = b"ten bytes!"
        large.write_bytes(data)
        relayed.relay.reset()
        result = member.build(context)
        sent = relayed.relay.up_bytes
        assert result.returncode == 0, result.stderr
        assert hashlib.sha256(data).hexdigest() in result.stderr, step
        stats = member.wait_state("succeeded")["stats"]
        assert (1 << 20 if step == "overwritten" else 10) <= stats["context_sent_bytes"] <= 4 << 20
        assert sent <= stats["context_sent_bytes"] + NAMES_BYTES


def test_buildkit_asks_for_nothing_of_a_tree_that_it_has(
    relayed: RelayedPool, tmp_path: Path
) -> None:
    member = relayed.member()
    files = {f"data/{number}": noise(number, 200_000) for number in range(40)}
    files["data/large"] = noise("requested", 5 << 20)
    context = write_files(
        tmp_path / "first" / "asked", files | {"Dockerfile": "FROM scratch\nCOPY data /\n"}
    )
    assert _bytes_into_buildkit(member, context) > 13_000_000
    # The content is the same, the times are not.
    assert _bytes_into_buildkit(member, context) < 100_000
    other = clone(context, tmp_path / "second" / "asked")
    assert _bytes_into_buildkit(member, other) < 100_000
    (other / "data/7").write_bytes(noise("seven", 200_000))
    assert 200_000 < _bytes_into_buildkit(member, other) < 300_000


def _bytes_into_buildkit(member: Member, context: Path) -> float:
    """Build; return what BuildKit says that it has received of the context."""
    # Builds of one place take turns with BuildKit's copy, but none waits for long.
    wait_cached(member)
    result = member.build(context)
    assert result.returncode == 0, result.stderr
    step = re.search(r"^#(\d+) \[internal\] load build context$", result.stderr, re.MULTILINE)
    assert step is not None, result.stderr
    told = re.findall(
        rf"^#{step[1]} transferring context: ([\d.]+)(k|M|G|)B", result.stderr, re.MULTILINE
    )
    assert told, result.stderr
    number, unit = told[-1]
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]


def test_sparse_file_of_zeros_travels_as_one_piece(relayed: RelayedPool, tmp_path: Path) -> None:
    member = relayed.member()
    context = make_context(tmp_path / "c", "COPY sparse /sparse\nRUN sha256sum /sparse\n")
    digest = hashlib.sha256()
    with (context / "sparse").open("wb") as file:
        file.truncate(200 << 20)
    for _ in range(200):
        digest.update(bytes(1 << 20))
    relayed.relay.reset()
    result = member.build(context)
    assert relayed.relay.up_bytes < 3 << 20
    assert result.returncode == 0, result.stderr
    assert digest.hexdigest() in result.stderr
    stats = member.wait_state("succeeded")["stats"]
    assert stats["context_bytes"] > 200 << 20
    assert stats["context_sent_bytes"] < 20 << 20


def test_empty_node_gets_the_content_of_another_from_the_shared_store(tmp_path: Path) -> None:
    files = {f"data/{number}": noise(f"shared{number}", 60_000) for number in range(50)}
    files["data/large"] = noise("shared", 6 << 20)
    context = write_files(
        tmp_path / "first" / "app", files | {"Dockerfile": "FROM scratch\nCOPY data /\n"}
    )
    size = sum(len(content) for name, content in files.items() if name.startswith("data"))
    with Pool(2, "--minio", "--slots", "1") as pool:
        first, second = pool.member(), pool.member()
        used = build(first, context)
        assert used["context_sent_bytes"] >= size
        where = first.wait_published()["node_id"]
        wait_packed(pool, size)
        holding = first.start(make_context(tmp_path / "busy", "RUN sleep 100\n"))
        try:
            wait_for_text(holding, "RUN sleep 100")
            tree = clone(context, tmp_path / "second" / "app")
            result = second.build("-o", f"type=tar,dest={tmp_path}/out.tar", tree)
        finally:
            holding.send_signal(signal.SIGINT)
            holding.communicate(timeout=30)
        assert result.returncode == 0, result.stderr
        newest = second.wait_state("succeeded")
        assert newest["node_id"] != where
        stats = newest["stats"]
        assert stats["context_shared_bytes"] >= size
        assert stats["context_sent_bytes"] == 0
        assert of_tar(tmp_path / "out.tar") == of_directory(tree / "data")


def wait_packed(pool: Pool, size: int) -> None:
    """Wait until the bucket holds so many bytes of build contexts, and the index of each pack."""
    context = pool.data / "minio/s3/offload/projects/default/context"
    deadline = time.monotonic() + 30
    while True:
        packs = {path.name for path in context.glob("packs/*")}
        indexes = {path.name for path in context.glob("index/*")}
        found = sum(path.stat().st_size for path in context.glob("packs/**/*") if path.is_file())
        if found >= size and packs == indexes:
            return
        assert time.monotonic() < deadline, f"{found} of {size} bytes are in the shared store"
        time.sleep(0.1)

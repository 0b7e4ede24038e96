"""`offload-build bake` on a whole pool."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import BASE, make_context
from tests.fixtures.pool import REPOSITORY, Pool, wait_for_text

if TYPE_CHECKING:
    from tests.fixtures.pool import Member

BUILDX = REPOSITORY / ".tools/bin/buildx"
PLANNERS = pytest.mark.parametrize("planner", ["none", str(BUILDX)], ids=["own", "buildx"])


def bake(
    member: Member, folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return member.run(
        "offload-build", "bake", "--progress", "plain", *arguments, cwd=folder,
        **{"OFFLOAD_BUILDX": "none", **environment},
    )  # fmt: skip


def wait_all_published(member: Member, count: int) -> None:
    """Wait until the caches of the newest builds are there for every node."""
    deadline = time.monotonic() + 60
    while True:
        states = [build["cache_state"] for build in member.builds()[:count]]
        if set(states) <= {"published", "unchanged"}:
            return
        assert set(states) <= {"published", "unchanged", "pending", "unspecified"}, states
        assert time.monotonic() < deadline, states
        time.sleep(0.2)


def project(folder: Path, definition: str, name: str = "docker-bake.hcl", **files: str) -> Path:
    make_context(folder, **files)
    (folder / name).write_text(definition)
    return folder


MATRIX = """
group "default" { targets = ["app", "image"] }
target "app" {
  name = "app-${v}"
  matrix = { v = ["1", "2", "3"] }
  args = { V = v }
  output = ["type=local,dest=out-${v}"]
}
target "image" {
  tags = ["baked:1"]
  output = ["type=oci,dest=image.tar"]
}
"""


@PLANNERS
def test_targets_with_one_context_send_it_once(
    member: Member, tmp_path: Path, planner: str
) -> None:
    folder = project(tmp_path / "p", MATRIX)
    (folder / "Dockerfile").write_text(
        f"{BASE}ARG V=0\nCOPY big many /data/\nRUN echo $V > /version\n"
    )
    (folder / "big").write_bytes(os.urandom(9_000_000))
    (folder / "many").mkdir()
    for number in range(200):
        (folder / "many" / f"f{number}").write_bytes(os.urandom(10_000))
    known = {build["build_id"] for build in member.builds()}
    result = bake(member, folder, "--metadata-file", "meta.json", OFFLOAD_BUILDX=planner)
    assert result.returncode == 0, result.stderr
    assert [(folder / f"out-{v}" / "version").read_text() for v in "123"] == ["1\n", "2\n", "3\n"]
    with tarfile.open(folder / "image.tar") as archive:
        assert "index.json" in archive.getnames()
    metadata = json.loads((folder / "meta.json").read_text())
    assert set(metadata) == {"app-1", "app-2", "app-3", "image"}
    assert metadata["image"]["image.name"] == "docker.io/library/baked:1"
    assert metadata["image"]["containerimage.digest"].startswith("sha256:")
    assert metadata["app-1"]["buildx.build.ref"].startswith("offload/")
    builds = [build for build in member.builds() if build["build_id"] not in known]
    assert len(builds) == 4
    by_node: dict[str, int] = {}
    for build in builds:
        by_node[build["node_id"]] = (
            by_node.get(build["node_id"], 0) + build["stats"]["context_sent_bytes"]
        )
    content = 11_000_000 + (folder / "busybox").stat().st_size
    # Each node gets it once at most, however many targets it builds.
    assert all(sent < content + 500_000 for sent in by_node.values()), by_node
    assert sum(by_node.values()) > 11_000_000
    for line in result.stderr.splitlines():
        if re.match(r"#\d+ \[", line):
            assert re.match(r"#\d+ \[(app-[123]|image)[] ]", line), line


CHAIN = """
group "default" { targets = ["top"] }
target "base" {
  dockerfile = "base.Dockerfile"
}
target "middle" {
  dockerfile-inline = <<-EOT
    FROM base
    RUN echo middle >> /log && head -c 6000000 /dev/urandom > /big
  EOT
  contexts = { base = "target:base" }
}
target "top" {
  dockerfile-inline = "FROM middle\\nCOPY --from=other /log /other\\nRUN echo top >> /log\\n"
  contexts = { middle = "target:middle", other = "target:base" }
  output = ["out"]
}
"""


@PLANNERS
def test_target_builds_upon_other_targets(member: Member, tmp_path: Path, planner: str) -> None:
    folder = project(tmp_path / "p", CHAIN)
    (folder / "base.Dockerfile").write_text(f"{BASE}RUN echo base > /log\n")
    result = bake(member, folder, "--metadata-file", "meta.json", OFFLOAD_BUILDX=planner)
    assert result.returncode == 0, result.stderr
    assert (folder / "out/log").read_text() == "base\nmiddle\ntop\n"
    assert (folder / "out/other").read_text() == "base\n"
    assert (folder / "out/big").stat().st_size == 6_000_000
    metadata = json.loads((folder / "meta.json").read_text())
    assert set(metadata["base"]) == {"buildx.build.provenance", "buildx.build.ref"}
    builds = member.builds()[:3]
    if len({build["node_id"] for build in builds}) == 1:
        # On one node the images never leave it.
        assert "fetching the image" not in result.stderr
    wait_all_published(member, 3)
    again = bake(member, folder, OFFLOAD_BUILDX=planner)
    assert again.returncode == 0, again.stderr
    assert (folder / "out/log").read_text() == "base\nmiddle\ntop\n"


def test_failure_of_one_target_ends_the_others(member: Member, tmp_path: Path) -> None:
    folder = project(
        tmp_path / "p",
        'group "default" {\n targets = ["bad", "slow"]\n}\n'
        'target "bad" {\n dockerfile = "bad.Dockerfile"\n}\n'
        'target "slow" {\n dockerfile = "slow.Dockerfile"\n}\n',
    )
    (folder / "bad.Dockerfile").write_text(f"{BASE}RUN echo begun && sleep 1 && exit 7\n")
    (folder / "slow.Dockerfile").write_text(f"{BASE}RUN sleep 600\n")
    result = bake(member, folder)
    assert result.returncode == 1, result.stderr
    assert "target bad: " in result.stderr
    assert "exit code: 7" in result.stderr
    states = {build["state"] for build in member.builds()[:2]}
    assert states <= {"failed", "canceled"}, states


ASKED = """
group "default" { targets = ["top", "other"] }
target "base" { dockerfile = "base.Dockerfile" }
target "top" {
  dockerfile-inline = "FROM base\\nCOPY docker-bake.hcl /\\n"
  contexts = { base = "target:base" }
}
target "other" { dockerfile-inline = "FROM scratch AS x\\nCOPY docker-bake.hcl /\\n" }
"""


@PLANNERS
def test_targets_upon_others_can_be_checked_and_nothing_is_built(
    member: Member, tmp_path: Path, planner: str
) -> None:
    folder = project(tmp_path / "p", ASKED)
    (folder / "base.Dockerfile").write_text(f"{BASE}RUN exit 9\n")
    clean = "Check complete, no warnings found.\n"
    result = bake(member, folder, "--check", OFFLOAD_BUILDX=planner)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"base\n\n{clean}\nother\n\n{clean}\ntop\n\n{clean}"
    result = bake(member, folder, "--set=base.call=check", OFFLOAD_BUILDX=planner)
    assert result.returncode == 1
    assert "target top cannot be built: base, which it builds upon, is not built" in result.stderr


def test_summary_counts_all_targets(member: Member, tmp_path: Path) -> None:
    folder = project(
        tmp_path / "p",
        'group "default" {\n targets = ["a", "b"]\n}\ntarget "a" {}\ntarget "b" {}\n',
    )
    (folder / "Dockerfile").write_text(f"{BASE}COPY big /\nRUN sleep 1.2 && echo {tmp_path}\n")
    (folder / "big").write_bytes(os.urandom(3_000_000))
    result = bake(member, folder)
    assert result.returncode == 0, result.stderr
    found = re.search(r"\[offload\] (\d) of (\d) steps cached; context (\S+),", result.stderr)
    # BuildKit may tell a step that both have in common once.
    assert found is not None and 4 < int(found[2]) <= 8, result.stderr
    times = re.search(r"\[offload\] [\d.]+s: steps [\d.]+s \(longest: .*sleep", result.stderr)
    assert times is not None, result.stderr
    again = bake(member, folder, "--no-cache", "a")
    assert "[offload] 0 of 4 steps cached" in again.stderr, again.stderr


def test_compose_file_is_built(member: Member, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    make_context(folder / "web", "ARG WHO\nRUN echo $WHO > /who\n")
    make_context(folder / "db", "RUN echo db > /who\n")
    (folder / "compose.yaml").write_text(
        "services:\n"
        "  web:\n    image: web:1\n    build:\n      context: ./web\n      args: [WHO]\n"
        "      additional_contexts: {database: 'service:db'}\n"
        "  db:\n    build: db\n"
        "  cache:\n    image: redis\n"
    )
    (folder / ".env").write_text("WHO=dotenv\n")
    result = bake(
        member, folder, "-f", "compose.yaml", "--set", "web.output=web", "--set", "db.output=db-out"
    )
    assert result.returncode == 0, result.stderr
    assert (folder / "web/who").read_text() == "dotenv\n"
    assert (folder / "db-out/who").read_text() == "db\n"


def test_print_and_list_need_no_pool(tmp_path: Path, pool: Pool) -> None:
    member = pool.member()
    assert member.offload("logout").returncode == 0
    folder = project(tmp_path / "p", MATRIX)
    shown = bake(member, folder, "--print", "image")
    assert shown.returncode == 0, shown.stderr
    assert set(json.loads(shown.stdout)["target"]) == {"image"}
    listed = bake(member, folder, "--list", "targets")
    assert "app-1" in listed.stdout
    refused = bake(member, folder, "nosuch")
    assert (refused.returncode, refused.stderr) == (1, "ERROR: failed to find target nosuch\n")


def test_image_is_handed_over_between_nodes(tmp_path: Path) -> None:
    folder = project(
        tmp_path / "p",
        'target "default" {\n dockerfile-inline = "FROM base\\nRUN wc -c < /big > /size\\n"\n'
        ' contexts = { base = "target:base" }\n output = ["out"]\n}\n'
        'target "base" {\n dockerfile = "base.Dockerfile"\n}\n',
    )
    (folder / "base.Dockerfile").write_text(
        f"{BASE}RUN head -c 6000000 /dev/urandom > /big && echo made && sleep 4\n"
    )
    wait = make_context(tmp_path / "w", "ARG T\nRUN echo waits && sleep $T\n")
    with Pool(2, "--slots", "1") as pool:
        member = pool.member()
        baking = subprocess.Popen(
            member.command("offload-build", "bake", "--progress", "plain"), cwd=folder,
            env={**member.environment, "OFFLOAD_BUILDX": "none"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        seen = wait_for_text(baking, "made")
        # The base has one node; these two take the other one, and its node when it is done.
        short = member.start("--build-arg", "T=6", wait)
        wait_for_text(short, "waits")
        long = member.start("--build-arg", "T=40", wait)
        output = seen + baking.communicate(timeout=100)[1]
        assert baking.returncode == 0, output
        assert (folder / "out/size").read_text() == "6000000\n"
        nodes = [build["node_id"] for build in member.builds()]
        assert len(set(nodes)) == 2
        assert "fetching the image from the node that made it" in output
        long.send_signal(signal.SIGINT)
        for other in (short, long):
            other.communicate(timeout=60)

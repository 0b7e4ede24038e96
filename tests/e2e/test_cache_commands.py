"""`offload cache` on whole pools, with a shared store and without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.pool import BIN, COMMAND_SECONDS, Member, Pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCKERFILE = """FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sleep", "1"]
RUN ["/bin/busybox", "dd", "if=/dev/urandom", "of=/{name}", "bs=1M", "count=2"]
"""
STEPS = 3


@pytest.fixture(params=["shared", "alone"])
def restartable(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[Pool]:
    """A pool of one node, with MinIO and without; its data stays over a restart."""
    data = tmp_path_factory.mktemp("p")
    options = ("--minio",) if request.param == "shared" else ()
    with Pool(1, *options, data=data) as running:
        yield running
    shutil.rmtree(data)


def checkout(folder: Path, branch: str) -> Path:
    """Make a build context in which a branch is checked out."""
    (folder / ".git").mkdir(parents=True, exist_ok=True)
    (folder / ".git/HEAD").write_text(f"ref: refs/heads/{branch}\n")
    (folder / "Dockerfile").write_text(DOCKERFILE.format(name=branch.replace("/", "-")))
    if not (folder / "busybox").exists():
        shutil.copy("/bin/busybox", folder / "busybox")
    return folder


def build(member: Member, context: Path) -> dict[str, Any]:
    """Build, wait until the cache is where it belongs; return the numbers of the build."""
    result = member.build(context)
    assert result.returncode == 0, result.stderr
    stats: dict[str, Any] = member.wait_published()["stats"]
    return stats


def usage(member: Member) -> dict[str, Any]:
    result = member.offload("cache", "usage", "--project", "default", "--format", "json")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    return dict(found)


def scopes(member: Member) -> dict[str, Any]:
    return {scope["scope"]: scope for scope in usage(member)["scopes"]}


def restart_with_cold_buildkit(pool: Pool) -> None:
    """Restart; BuildKit loses its own cache, so that only the layer cache is left."""
    pool.stop()
    for folder in pool.data.glob("node-*/projects/*/buildkit"):
        shutil.rmtree(folder)
    pool.start()


@pytest.mark.timeout(300)
def test_cache_is_measured_pruned_and_works_again(restartable: Pool, tmp_path: Path):
    pool = restartable
    member = pool.member()
    context = checkout(tmp_path / "shop", "main")
    assert build(member, context)["steps_cached"] == 0
    restart_with_cold_buildkit(pool)
    member = pool.member()
    warm = build(member, context)
    assert (warm["steps_cached"], warm["steps_total"]) == (STEPS, STEPS)
    assert warm["saved_milliseconds"] >= 1000
    build(member, checkout(context, "feature/x"))

    found = usage(member)
    shown = {scope["scope"]: scope for scope in found["scopes"]}
    assert set(shown) == {"main", "feature/x"}
    assert shown["main"]["own_bytes"] > 2_000_000
    assert shown["main"]["layer_bytes"] > shown["main"]["own_bytes"]
    assert shown["main"]["member"] == "admin"
    assert found["gain"]["builds"] == 3
    assert 0.3 < found["gain"]["hit_rate"] < 0.7
    assert found["gain"]["saved_seconds"] >= 1
    (node,) = found["nodes"]
    assert node["blob_bytes"] > 4_000_000
    assert node["buildkit_bytes"] > 0
    assert node["context_bytes"] > 0
    table = member.offload("cache", "usage").stdout
    assert "feature/x" in table
    assert "HIT RATE" in table

    asked = member.run("offload", "cache", "prune", cwd=context)
    assert asked.returncode == 125
    assert "--force" in asked.stderr
    dry = member.run("offload", "cache", "prune", "--dry-run", cwd=context)
    assert dry.returncode == 0
    assert "feature/x" in dry.stdout
    assert "main" not in dry.stdout
    assert set(scopes(member)) == {"main", "feature/x"}
    for options in (("--unused-for", "1d"), ("--keep-storage", "1GB")):
        spared = member.offload("cache", "prune", "--all-scopes", "--force", *options)
        assert "nothing to prune" in spared.stdout, spared

    done = member.run("offload", "cache", "prune", "--force", cwd=context)
    assert done.returncode == 0, done.stderr
    assert "Deleted cache entries: 1" in done.stdout
    assert set(scopes(member)) == {"main"}
    emptied = member.offload("cache", "prune", "--all-scopes", "-f")
    assert emptied.returncode == 0, emptied.stderr
    assert scopes(member) == {}
    restart_with_cold_buildkit(pool)
    member = pool.member()
    again = build(member, checkout(context, "main"))
    assert (again["steps_cached"], again["steps_total"]) == (0, STEPS)
    assert set(scopes(member)) == {"main"}


def run_builder(pool: Pool, *arguments: str) -> str:
    """Run a command of the gateway's machine beside the gateway."""
    return subprocess.run(
        [BIN / "offload-builder", *arguments, "--data-dir", pool.data / "gateway"],
        capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True,
    ).stdout  # fmt: skip


def test_others_scopes_are_safe_and_promotion_copies_a_branch(pool: Pool, tmp_path: Path):
    run_builder(pool, "project", "create", "promo")
    environment = {"OFFLOAD_PROJECT": "promo"}
    ann = pool.member(pool.create_token("ann"), **environment)
    eve = pool.member(pool.create_token("eve", "untrusted"), **environment)
    admin = pool.member(**environment)
    context = checkout(tmp_path / "promo", "topic/a")
    build(ann, context)
    build(eve, checkout(tmp_path / "eve", "main"))

    for who, scope in ((ann, "~untrusted-eve"), (eve, "topic/a")):
        refused = who.offload("cache", "prune", "--scope", scope, "--force")
        assert refused.returncode == 4, refused
    refused = ann.offload("cache", "prune", "--all-scopes", "--dry-run")
    assert (refused.returncode, "administrator" in refused.stderr) == (4, True)
    assert ann.offload("cache", "promote", "topic/a").returncode == 4
    refused = admin.offload("cache", "promote", "~untrusted-eve")
    assert refused.returncode == 4, refused.stderr

    promoted = admin.offload("cache", "promote", "topic/a", "--to", "main")
    assert promoted.stdout == "Promoted cache entries: 1\n", promoted.stderr
    again = admin.offload("cache", "promote", "topic/a", "--to", "main")
    assert again.stdout == "Promoted cache entries: 0\n"
    result = admin.offload("cache", "usage", "--project", "promo", "--format", "json")
    (found,) = json.loads(result.stdout)
    assert {scope["scope"] for scope in found["scopes"]} == {"topic/a", "main", "~untrusted-eve"}
    assert found["shared_bytes"] > 2_000_000
    assert len(found["nodes"]) == 2


def test_bounds_of_a_project_reach_the_nodes_and_hold(pool: Pool, tmp_path: Path):
    run_builder(pool, "project", "create", "tight")
    member = pool.member(OFFLOAD_PROJECT="tight")
    build(member, checkout(tmp_path / "tight", "main"))
    run_builder(
        pool, "project", "set", "tight", "--cache-keep", "100GB", "--cache-idle", "14d",
        "--node-cache-keep", "1MB",
    )  # fmt: skip
    listed = run_builder(pool, "project", "list")
    assert [
        line.split()[column] for line in listed.splitlines() if "tight" in line
        for column in (0, 2, 3, 4)
    ] == ["tight", "100GB", "14d", "1MB"]  # fmt: skip
    deadline = time.monotonic() + 15
    while True:
        result = member.offload("cache", "usage", "--project", "tight", "--format", "json")
        (found,) = json.loads(result.stdout)
        if all(node["blob_keep_bytes"] == 1_000_000 for node in found["nodes"]) and all(
            node["blob_bytes"] <= 1_000_000 for node in found["nodes"]
        ):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.3)
    assert found["shared_keep_bytes"] == 100_000_000_000
    run_builder(pool, "project", "set", "tight", "--node-cache-keep", "default")

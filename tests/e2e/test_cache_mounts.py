"""Cache mounts follow the builds of a project to nodes that never ran them."""

from __future__ import annotations

import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import Pool, wait_for_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.pool import Member

STORED_SECONDS = 40.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Two nodes with one slot each: while one is busy, the other gets the next build."""
    environment = {"OFFLOAD_NODE_CACHE_MOUNT_INTERVAL": "0s"}
    with Pool(2, "--minio", "--slots", "1", environment=environment) as running:
        yield running


def events(pool: Pool, name: str) -> list[dict[str, Any]]:
    """Return what the nodes logged under a name."""
    found = []
    for path in pool.data.glob("node-*/node.log"):
        for line in path.read_text("utf-8", "replace").splitlines():
            if f'"{name}"' in line or f" {name} " in line:
                try:
                    found.append({**json.loads(line), "node": path.parent.name})
                except ValueError:
                    found.append({"text": line, "node": path.parent.name})
    return found


def wait_stored(pool: Pool, count: int) -> None:
    """Wait until so many mounts were stored, and the shared store has them."""
    deadline = time.monotonic() + STORED_SECONDS
    while len(events(pool, "mounts.kept")) < count:
        assert time.monotonic() < deadline, pool.tails()
        time.sleep(0.1)
    time.sleep(1.0)


@contextmanager
def first_node_busy(member: Member, folder: Path) -> Iterator[None]:
    """Keep the node that the project prefers from taking builds."""
    holding = member.start(make_context(folder, f"RUN echo {time.time_ns()} && sleep 100\n"))
    try:
        wait_for_text(holding, "sleep 100")
        yield
    finally:
        holding.send_signal(signal.SIGINT)
        holding.communicate(timeout=30)


MOUNT = "--mount=type=cache,target=/cache,id={id}"


def test_second_node_has_what_the_first_left_in_the_mount(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    mount = MOUNT.format(id="marker")
    stored = len(events(pool, "mounts.kept"))
    first = make_context(
        tmp_path / "a", f"RUN {mount} mkdir /cache/dir && echo from-the-first > /cache/dir/file\n"
    )
    result = member.build(first)
    assert result.returncode == 0, result.stderr
    used = member.wait_published()["node_id"]
    wait_stored(pool, stored + 1)
    second = make_context(tmp_path / "b", f"RUN {mount} cat /cache/dir/file\n")
    with first_node_busy(member, tmp_path / "busy"):
        result = member.build(second)
        newest = member.wait_state("succeeded")
    assert result.returncode == 0, result.stderr + pool.tails()
    assert newest["node_id"] != used
    assert "from-the-first" in result.stderr
    assert "cache mount marker" in result.stderr
    assert "restored" in result.stderr


def test_build_that_is_cached_on_a_cold_node_restores_nothing(pool: Pool, tmp_path: Path) -> None:
    member = pool.member()
    stored = len(events(pool, "mounts.kept"))
    mount = MOUNT.format(id="cached")
    context = make_context(tmp_path / "cached", f"RUN {mount} echo x > /cache/file\n")
    assert member.build(context).returncode == 0
    used = member.wait_published()["node_id"]
    wait_stored(pool, stored + 1)
    restored = len(events(pool, "mounts.restored"))
    with first_node_busy(member, tmp_path / "busy"):
        result = member.build(context)
        newest = member.wait_state("succeeded")
    assert result.returncode == 0, result.stderr
    assert newest["node_id"] != used
    assert newest["stats"]["steps_total"] == newest["stats"]["steps_cached"] > 0
    assert len(events(pool, "mounts.restored")) == restored

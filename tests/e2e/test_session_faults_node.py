"""Sessions whose engine, node or machine fails: they end, say why, and leave nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.sessionpool import IMAGE, PATIENCE, SessionMember, SessionPool, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    with SessionPool("one") as running:
        yield running


@pytest.fixture(scope="module")
def ann(pool: SessionPool) -> SessionMember:
    return pool.member("ann")


def busy(member: SessionMember) -> str:
    """Start a session with a container, a volume and a network of its own; return its id."""
    session_id = member.start()
    member.docker_well("network", "create", "own")
    member.docker_well("run", "-d", "--name", "steady", "--network", "own", "-v", "kept:/kept",
                       IMAGE, "sh", "-c", "while :; do echo tick; sleep 0.1; done")  # fmt: skip
    return session_id


def engine_of(pool: SessionPool, program: str) -> int:
    """Return the first process of a name in an engine of the pool's only node."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text().strip()
            if name == program and str(pool.folder) in (process / "mountinfo").read_text():
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no {program} runs in an engine")


def gone(member: SessionMember, why: str) -> None:
    """Check that docker and our commands say why a session is no more, and clear it away."""
    until(lambda: member.view()["state"] in ("ended", "lost"), "the news of the end")
    asked = member.docker("ps")
    assert asked.returncode == 1
    assert why in asked.stderr
    assert "offload start" in asked.stderr
    view = member.view()
    assert why in view["reason"], view
    assert "offload stop default" in view["reason"]
    shown = member.well("status")
    assert "State:            Ended" in shown or "State:            Lost" in shown, shown
    used = member.offload("use")
    assert used.returncode == 5
    assert why in used.stderr
    done = member.offload("stop", "-f")
    assert done.returncode == 0, done.stderr
    assert "was gone already" in done.stdout
    assert why in done.stdout
    assert (member.names, member.context) == ([], "")
    until(lambda: not member.helpers(), "the end of the helper")


def test_engine_that_dies_ends_its_session(pool: SessionPool, ann: SessionMember) -> None:
    session_id = busy(ann)
    following = ann.begin("logs", "-f", "steady")
    assert following.stdout is not None
    assert following.stdout.readline() == "tick\n"
    os.kill(engine_of(pool, "dockerd"), signal.SIGKILL)
    _, err = following.communicate(timeout=PATIENCE)
    assert following.returncode != 0 or not err.strip()
    until(lambda: ann.listed(session_id)["state"] == "ended", "the end of the session")
    assert "its docker engine ended" in ann.listed(session_id)["reason"]
    assert session_id in ann.well("ps", "-a")
    assert session_id not in ann.well("ps")
    gone(ann, "its docker engine ended")
    until(lambda: not pool.traces("one"), "the end of everything at the node")
    # The node is as good as before.
    renewed = ann.start()
    assert renewed != session_id
    ann.docker_well("run", "--rm", IMAGE, "true")
    ann.well("stop", "-f")


def test_node_that_is_killed_comes_back_with_nothing_of_its_sessions(
    pool: SessionPool, ann: SessionMember
) -> None:
    session_id = busy(ann)
    assert pool.traces("one")
    pool.kill("one")
    pool.start_node("one")
    until(lambda: not pool.traces("one"), "the end of everything at the node")
    # A node that is slow to come back was lost in the meantime; then it says what became of it.
    restarted = {"state": "ended", "reason": "the node was restarted"}
    until(lambda: restarted.items() <= ann.listed(session_id).items(), "the news of the end")
    gone(ann, "node ")
    ann.start()
    ann.docker_well("run", "--rm", IMAGE, "true")
    ann.well("stop", "-f")


def test_session_of_a_node_that_stays_away_is_lost(pool: SessionPool, ann: SessionMember) -> None:
    session_id = busy(ann)
    pool.kill("one")
    try:
        until(lambda: ann.listed(session_id)["state"] == "lost", "the loss of the session")
        assert "node one was lost" in ann.listed(session_id)["reason"]
        until(lambda: "node one was lost" in ann.docker("ps").stderr, "the news for docker")
        assert ann.view()["state"] == "ended"
        done = ann.offload("start", "--timeout", "3s", "--progress", "plain")
        assert done.returncode == 6, (done.stdout, done.stderr)
        assert "node one was lost" in done.stderr
        assert (ann.names, ann.context) == ([], "")
    finally:
        pool.start_node("one")
    until(lambda: not pool.traces("one"), "the end of everything at the node")


def test_node_that_is_stopped_waits_for_its_sessions_and_then_ends_them(
    pool: SessionPool, ann: SessionMember
) -> None:
    pool.end("one")
    pool.start_node("one", OFFLOAD_NODE_DRAIN_TIMEOUT="4s")
    session_id = busy(ann)
    pool.signal("one", signal.SIGTERM)
    until(lambda: "node.draining" in pool.log("one").rpartition("=== starts")[2], "the drain")
    # Those that are there go on, for as long as the node waits; new ones are not taken.
    assert ann.docker("ps", "--format", "{{.Names}}").stdout == "steady\n"
    waiting = ann.offload("start", "other", "--no-use", "--timeout", "1s", "--progress", "plain")
    assert waiting.returncode == 6, waiting.stderr
    assert "is draining" in waiting.stderr
    assert pool.wait("one") == 0
    assert pool.traces("one") == []
    until(lambda: ann.listed(session_id)["state"] == "ended", "the end of the session")
    pool.start_node("one")
    gone(ann, "the node stops")

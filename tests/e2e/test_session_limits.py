"""What sessions may have: numbers, sizes, times and places in the queue, as people meet them."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.pool import wait_for_text
from tests.fixtures.sessionpool import IMAGE, PATIENCE, SessionMember, SessionPool, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(400), pytest.mark.in_order]
SHORT_SECONDS = 64
"""A minute before the end of a session its people are told."""
IDLE_SECONDS = 5


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    options = {
        "OFFLOAD_NODE_SESSION_SLOTS": "3",
        "OFFLOAD_NODE_LABELS": "zone=eu,disk=ssd",
        "OFFLOAD_NODE_SESSION_MEMORY": "300m",
        "OFFLOAD_NODE_SESSION_MEMORY_MAX": "600m",
        "OFFLOAD_NODE_SESSION_DISK": "600m",
        "OFFLOAD_NODE_SESSION_DISK_MAX": "700m",
        "OFFLOAD_NODE_SESSION_GRACE": "4s",
    }
    bounds = {"OFFLOAD_GATEWAY_SESSIONS_PER_MEMBER": "1"}
    with SessionPool("one", node=options, gateway=bounds) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def short(pool: SessionPool) -> tuple[SessionMember, str, float]:
    """Somebody with a short session, who waits for its end while others do something."""
    zoe = pool.member("zoe")
    session_id = zoe.start("--ttl", f"{SHORT_SECONDS}s")
    zoe.docker_well("run", "-d", "--name", "busy", IMAGE, "sleep", "1000")
    return zoe, session_id, time.monotonic()


@pytest.fixture(scope="module")
def ann(pool: SessionPool) -> SessionMember:
    return pool.member("ann")


@pytest.fixture
def session(ann: SessionMember) -> Iterator[SessionMember]:
    """Somebody with a session."""
    ann.start()
    yield ann
    ann.well("stop", "-f")


def test_people_are_told_before_the_time_of_a_session_is_over(
    short: tuple[SessionMember, str, float],
) -> None:
    zoe = short[0]
    until(lambda: "this session ends in" in (zoe.view().get("warning") or ""), "the warning")
    assert "WARNING: this session ends in" in zoe.well("status", "-s")
    assert zoe.view()["seconds_until_end"] <= SHORT_SECONDS


def test_full_node_is_waited_for_and_taken_when_another_stops(
    pool: SessionPool, session: SessionMember
) -> None:
    bea, cid = pool.member("bea"), pool.member("cid")
    bea.start(load=False)
    late = cid.offload("start", "--timeout", "1s", "--progress", "plain")
    assert late.returncode == 6, late.stderr
    assert "full of sessions" in late.stderr
    assert (cid.names, cid.context) == ([], "")
    waiting = cid.begin("start", "--progress", "plain", program="offload")
    shown = wait_for_text(waiting, "queue position 1")
    assert "the only node that can take it, one, is full of sessions" in shown
    assert waiting.poll() is None
    bea.well("stop", "-f")
    out, err = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0, shown + err
    assert 'Session "default" is ready on node one' in out
    cid.docker_well("ps")
    cid.well("stop", "-f")


@pytest.mark.parametrize(
    ("wish", "code", "said"),
    [
        (["--node-label", "zone=us"], 5, ["zone=us", "zone=eu", "disk=ssd"]),
        (["--gpu"], 5, ["a GPU", "they have no devices"]),
        (["--device", "acme.com/tpu=0"], 5, ["acme.com/tpu=0", "they have no devices"]),
        (["--memory", "4g"], 5, ["4GiB of memory", "the most that one gives is 572.2MiB"]),
        (["--disk-size", "1t"], 5, ["of disk", "the most that one gives is"]),
        (["--cpus", "900"], 5, ["900 processors", "the most that one gives is"]),
    ],
)
def test_what_no_node_has_is_refused_at_once_with_what_there_is(
    ann: SessionMember, wish: list[str], code: int, said: list[str]
) -> None:
    done = ann.offload("start", *wish)
    assert done.returncode == code, done.stderr
    for text in said:
        assert text in done.stderr, done.stderr
    assert (ann.names, ann.context) == ([], "")


def test_session_has_the_memory_that_it_was_given(session: SessionMember) -> None:
    fill = "head -c 600000000 /dev/zero | tail -c 500000000 >/dev/null"
    done = session.docker("run", "--name", "greedy", IMAGE, "sh", "-c", f"{fill}; exit $?")
    assert done.returncode == 137, done
    # The session goes on.
    assert session.docker_well("run", "--rm", IMAGE, "echo", "hi") == "hi\n"
    assert session.view()["state"] == "running"
    assert session.docker_well("info", "-f", "{{.MemTotal}}").strip()


def test_full_disk_is_said_and_can_be_made_empty(pool: SessionPool, session: SessionMember) -> None:
    fill = "dd if=/dev/zero of=/big bs=1M count=800"
    done = session.docker("run", "--name", "big", IMAGE, "sh", "-c", fill)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    for words in (
        ("import", str(pool.archive), "more:1"),
        ("run", "--rm", IMAGE, "sh", "-c", fill),
    ):
        full = session.docker(*words)
        assert full.returncode != 0, words
        assert "no space left on device" in full.stderr.lower(), (words, full.stderr)
    assert session.docker_well("ps", "-a", "--format", "{{.Names}}") == "big\n"
    assert session.view()["state"] == "running"
    session.docker_well("system", "prune", "-f")
    assert session.docker_well("run", "--rm", IMAGE, "echo", "hi") == "hi\n"
    session.docker_well("import", str(pool.archive), "more:1")


def test_member_has_as_many_sessions_as_allowed(session: SessionMember) -> None:
    done = session.offload("start", "second", "--no-use")
    assert done.returncode == 6, done.stderr
    assert "you have 1 open session, and more than 1 may not be open at once" in done.stderr
    assert "stop one of them" in done.stderr
    assert session.names == ["default"]


def test_idle_session_is_paused_woken_with_everything_and_removed_when_nobody_comes(
    pool: SessionPool, ann: SessionMember
) -> None:
    session_id = ann.start("--idle-timeout", f"{IDLE_SECONDS}s")
    ann.docker_well("volume", "create", "kept")
    ann.docker_well("run", "--name", "wrote", "-v", "kept:/kept", IMAGE, "sh", "-c",
                    "echo hello > /kept/file")  # fmt: skip
    until(lambda: ann.view()["seconds_until_idle"] is not None, "the countdown")
    assert ann.view()["seconds_until_idle"] <= IDLE_SECONDS
    assert re.search(r"Time until idle: +\d+s", ann.well("status", "-s"))
    until(lambda: ann.view()["state"] == "paused", "the pause")
    assert ann.view()["seconds_until_removal"] <= 4
    shown = ann.well("status", "-s")
    assert re.search(r"Time until idle: +paused", shown)
    assert re.search(r"Removed in: +\ds", shown)
    assert "WARNING" not in shown, "the warning of before"
    assert ann.listed(session_id)["state"] == "paused"
    # Looking at it has not woken it; docker does.
    read = ann.docker_well("run", "--rm", "-v", "kept:/kept", IMAGE, "cat", "/kept/file")
    assert read == "hello\n"
    assert ann.docker_well("ps", "-a", "--format", "{{.Names}}") == "wrote\n"
    until(lambda: ann.view()["state"] == "running", "the news of it")
    until(lambda: ann.view()["state"] == "ended", "the end")
    assert "it was not used" in ann.view()["reason"]
    assert "it was not used" in ann.docker("ps").stderr
    again = ann.offload("start", "-q")
    assert again.returncode == 0, again.stderr
    assert "has ended: it was not used" in again.stderr
    assert again.stdout.strip() != session_id
    ann.well("stop", "-f")


def test_session_ends_when_its_time_is_over(
    pool: SessionPool, short: tuple[SessionMember, str, float]
) -> None:
    zoe, session_id, started = short
    until(lambda: zoe.view()["state"] == "ended", "the end", seconds=SHORT_SECONDS + PATIENCE)
    assert time.monotonic() - started > SHORT_SECONDS / 2
    asked = zoe.docker("ps")
    assert asked.returncode == 1
    assert "its time is over" in asked.stderr
    assert "its time is over" in zoe.listed(session_id)["reason"]
    until(lambda: pool.traces("one") == [], "the end of everything at the node")

"""Sessions whose network breaks: commands end, containers go on, and the next command works."""

from __future__ import annotations

import random
import re
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.sessionpool import IMAGE, PATIENCE, SessionMember, SessionPool, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(400)
CUTS = 20
SEED = 20_911
TICKS = "n=0; while :; do n=$((n+1)); echo tick $n; usleep 50000; done"
COMMANDS = {
    "ps": ("ps", "-a"),
    "run": ("run", "--rm", IMAGE, "sh", "-c", "echo begun; usleep 300000; echo over"),
    "logs": ("logs", "-f", "--tail", "5", "steady"),
    "exec": ("exec", "steady", "sh", "-c", "for n in 1 2 3 4; do echo $n; usleep 100000; done"),
    "cp there": ("cp", "large", "steady:/tmp/large"),
    "cp back": ("cp", "steady:/tmp/kept", "got"),
    "save": ("save", "-o", "saved.tar", "large:1"),
    "load": ("load", "-q", "-i", "large.tar"),
    "stats": ("stats", "--no-stream", "steady"),
}
ENDLESS = ("logs",)
"""They end by the cut alone."""


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    with SessionPool("one", direct=True) as running:
        yield running


@pytest.fixture(scope="module")
def member(pool: SessionPool) -> SessionMember:
    """Somebody with a session in which the container `steady` runs."""
    ann = pool.member("ann")
    ann.start()
    ann.docker_well("run", "-d", "--name", "steady", IMAGE, "sh", "-c", TICKS)
    return ann


def life_of(member: SessionMember) -> str:
    """Return what is another when the container was not the same all the time."""
    form = "{{.Id}} {{.State.StartedAt}} {{.State.Running}} {{.RestartCount}}"
    return member.docker_well("inspect", "-f", form, "steady")


def last_tick(member: SessionMember) -> int:
    found = re.search(r"tick (\d+)", member.docker_well("logs", "--tail", "1", "steady"))
    assert found is not None
    return int(found[1])


def test_cut_network_ends_commands_and_nothing_else(
    pool: SessionPool, member: SessionMember, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    relay = pool.node_relays["one"]
    (member.home / "large").write_bytes(chance.randbytes(24 << 20))
    member.docker_well("cp", "large", "steady:/tmp/kept")
    member.docker_well("commit", "steady", "large:1")
    member.docker_well("save", "-o", "large.tar", "large:1")
    life, tick = life_of(member), last_tick(member)
    names = [*COMMANDS, *chance.choices(list(COMMANDS), k=CUTS - len(COMMANDS))]
    broken = 0
    for name in names:
        point = chance.uniform(0.0, 0.5)
        where = f"{name!r} cut after {point:.3f} s"
        command = member.begin(*COMMANDS[name])
        # By the clock: the point is the test, and any one will do.
        time.sleep(point)
        if name in ENDLESS:
            assert command.poll() is None, where
        relay.cut()
        out, err = command.communicate(timeout=PATIENCE)
        if command.returncode != 0:
            broken += 1
            assert err.strip(), (where, command.returncode, out)
            assert "Traceback" not in err, where
        shown = member.docker("ps", "--format", "{{.Names}}", "-f", "name=steady")
        assert (shown.returncode, shown.stdout.strip()) == (0, "steady"), (where, shown)
    assert broken, "no cut met a command"
    assert life_of(member) == life
    assert last_tick(member) > tick
    view = member.view()
    assert (view["state"], view["helper"]) == ("running", "running")
    # Of the commands that were cut, the engine keeps nothing open.
    until(lambda: member.view()["open_connections"] == 0, "the end of all connections")


def test_silent_network_ends_commands_and_they_work_when_it_speaks(
    pool: SessionPool, member: SessionMember
) -> None:
    relays = (pool.node_relays["one"], pool.relay)
    life = life_of(member)
    following = member.begin("logs", "-f", "--tail", "1", "steady")
    assert following.stdout is not None
    assert following.stdout.readline().startswith("tick ")
    for relay in relays:
        relay.silent = True
    asking = member.begin("ps", "-q")
    # Nobody resets anything; both are told all the same.
    _, err = asking.communicate(timeout=PATIENCE)
    assert asking.returncode != 0
    assert err.strip()
    following.communicate(timeout=PATIENCE)
    until(lambda: member.view()["helper"] == "reconnecting", "the news of it")
    said = member.docker("ps", "-q")
    assert said.returncode == 1
    assert "the session cannot be reached" in said.stderr
    for relay in relays:
        relay.silent = False
    until(lambda: member.docker("ps", "-q").returncode == 0, "the session")
    assert member.view()["helper"] == "running"
    assert life_of(member) == life


def test_session_does_not_need_the_gateway_while_that_restarts(
    pool: SessionPool, member: SessionMember
) -> None:
    life = life_of(member)
    count = "for n in 1 2 3 4 5 6 7 8 9; do echo $n; sleep 1; done"
    counting = member.begin("exec", "steady", "sh", "-c", count)
    pool.kill("gateway")
    assert member.docker_well("ps", "--format", "{{.Names}}").strip() == "steady"
    assert member.offload("ps").returncode == 7
    pool.start_gateway()
    out, err = counting.communicate(timeout=PATIENCE)
    assert (counting.returncode, out.split()) == (0, list("123456789")), err
    session_id = member.view()["session_id"]
    until(lambda: member.offload("ps", "-q").stdout.strip() == session_id, "the gateway")
    assert member.listed(session_id)["state"] == "running"
    assert life_of(member) == life


def test_session_by_way_of_the_gateway_comes_back_with_it(
    pool: SessionPool, member: SessionMember
) -> None:
    life = life_of(member)
    relay = pool.node_relays["one"]
    kept, relay.target = relay.target, "127.0.0.1:1"
    try:
        # Its own address does not answer any more; the gateway's does.
        relay.cut()
        until(lambda: member.docker("ps", "-q").returncode == 0, "the other way")
        following = member.begin("logs", "-f", "--tail", "1", "steady")
        threading.Timer(1.0, pool.kill, ("gateway",)).start()
        following.communicate(timeout=PATIENCE)
        pool.start_gateway()
        until(lambda: member.docker("ps", "-q").returncode == 0, "the session")
        assert life_of(member) == life
    finally:
        relay.target = kept

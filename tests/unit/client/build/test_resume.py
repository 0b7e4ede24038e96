"""A build whose connection breaks: it goes on by itself, and ends when that does not help."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from typing import TYPE_CHECKING

import pytest

from offload_client.build import comeback
from offload_client.build import resume as module
from offload_client.build.attachment import LOST
from offload_client.build.resume import PAUSES_SECONDS, Resume, repeats_of
from offload_core.errors import ConfigError, GatewayUnreachableError, NodeLostError
from tests.fixtures.localcommand import SIZE

if TYPE_CHECKING:
    from tests.fixtures.cutrelay import CutRelay
    from tests.fixtures.localcommand import Command
    from tests.fixtures.nodepeer import NodePeer

NOTICE = "the connection to node node-1 was lost; trying again, what has arrived is not sent again"


def test_pauses_grow_and_end_when_nothing_arrives() -> None:
    resume = Resume()
    assert not resume.begun
    pauses = [resume.next_pause(progressed=False) for _ in range(6)]
    assert pauses == [*PAUSES_SECONDS, None]
    assert resume.begun


def test_progress_starts_the_count_anew() -> None:
    resume = Resume()
    for _ in range(4):
        resume.next_pause(progressed=False)
    assert resume.next_pause(progressed=True) == PAUSES_SECONDS[0]
    pauses = [resume.next_pause(progressed=False) for _ in range(5)]
    assert pauses == [*PAUSES_SECONDS[1:], None]


def test_repeats_are_counted_and_configured() -> None:
    assert Resume().may_repeat
    assert repeats_of({}) == 2
    assert repeats_of({"OFFLOAD_REPEATS": "0"}) == 0
    assert not Resume(0).may_repeat
    assert Resume(0).given_up == "run it again"
    lost = Resume(2)
    lost.repeated = 2
    assert not lost.may_repeat
    assert lost.given_up == "it was repeated 2 times and lost again; run it again"
    for wrong in ("-1", "many", "1.5", "101", "\u0662"):
        with pytest.raises(ConfigError, match="OFFLOAD_REPEATS"):
            repeats_of({"OFFLOAD_REPEATS": wrong})


async def test_undisturbed_build_sends_everything_once_and_says_so(
    command: Command, peer: NodePeer
) -> None:
    digests = command.fill()
    shown = await command.run()
    assert digests <= peer.receiver.blobs.keys()
    assert set(peer.receiver.blobs.values()) == {1}
    assert re.search(r"\[offload\] build context: 12\.\d+MB sent in \d\.\ds", shown)
    assert peer.created and not peer.canceled


async def test_second_build_of_a_known_context_says_that_nothing_is_sent(
    command: Command, peer: NodePeer
) -> None:
    command.fill()
    await command.run()
    before = len(peer.receiver.order)
    shown = await command.run()
    assert len(peer.receiver.order) == before
    assert re.search(r"\[offload\] build context: 12\.\d+MB in 62 files, nothing to send", shown)


@pytest.mark.parametrize("seed", range(3))
async def test_cut_connections_cost_little(
    command: Command, peer: NodePeer, relay: CutRelay, seed: int
) -> None:
    digests = command.fill()
    dice = random.Random(seed)
    points = sorted(dice.randrange(20_000, SIZE) for _ in range(2))
    relay.cut_after(*points)
    shown = await command.run()
    assert relay.cuts == 2
    assert digests <= peer.receiver.blobs.keys()
    assert relay.up_bytes < SIZE + 2 * (3 << 20), points
    assert shown.count(NOTICE) == len(peer.created) - 1 == 2
    assert len(set(peer.created)) == 3
    assert peer.canceled == ["build-1", "build-2"]


async def test_steps_of_a_lost_attempt_do_not_stay_open(
    command: Command, peer: NodePeer, relay: CutRelay
) -> None:
    command.fill()
    relay.cut_after(5 << 20)
    shown = await command.run("rawjson")
    last = {}
    errors = []
    for line in shown.splitlines():
        if line.startswith("WARNING"):
            continue
        for vertex in json.loads(line).get("vertexes", ()):
            last[vertex["digest"]] = vertex
            errors.append(vertex.get("error"))
    assert "context canceled" in errors
    assert all("completed" in vertex for vertex in last.values())
    # The step of the second run is another one.
    loads = [item for item in last.values() if item["name"] == last["sha256:load"]["name"]]
    assert loads[-1].get("error") is None


async def test_node_that_stays_away_is_given_up_in_the_end(
    command: Command, peer: NodePeer, relay: CutRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comeback, "COME_BACK_SECONDS", 3.0)
    peer.hold_after = 1
    target = relay.target

    async def cut() -> None:
        while not peer.created or not peer.taken or not peer.taken[1].last.is_set():
            await asyncio.sleep(0.02)
        relay.target = "127.0.0.1:1"
        relay.cut_after(relay.up_bytes + 1)

    cutting = asyncio.create_task(cut())
    try:
        command.fill()
        with pytest.raises((NodeLostError, GatewayUnreachableError)):
            async with asyncio.timeout(60):
                await command.run()
    finally:
        cutting.cancel()
        relay.target = target
    shown = command.screen.getvalue()
    assert shown.count(LOST) == 1
    assert NOTICE not in shown
    assert len(peer.created) == 1


async def test_cancelling_during_a_pause_ends_at_once(
    command: Command, peer: NodePeer, relay: CutRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES_SECONDS", (30.0,) * 5)
    command.fill()
    relay.cut_after(5 << 20)
    building = asyncio.create_task(command.run())
    async with asyncio.timeout(30):
        while NOTICE not in command.screen.getvalue():
            await asyncio.sleep(0.02)
    began = time.monotonic()
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert time.monotonic() - began < 2


async def test_what_the_node_itself_says_is_not_tried_again(
    command: Command, peer: NodePeer
) -> None:
    command.fill()
    peer.refusal = NodeLostError("buildkitd was killed")
    with pytest.raises(NodeLostError, match="buildkitd was killed"):
        await command.run()
    assert len(peer.created) == 1
    assert NOTICE not in command.screen.getvalue()


async def test_node_that_never_answered_is_not_tried_again(
    command: Command, peer: NodePeer
) -> None:
    peer.address = "127.0.0.1:1"
    with pytest.raises(NodeLostError, match="does not answer"):
        await command.run()
    assert len(peer.created) == 1

"""A build whose client comes back after a loss, or leaves it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from typing import TYPE_CHECKING

import pytest

from offload_client.bake.bakerun import BakeRun
from offload_client.bake.plan import BakePlan
from offload_client.bake.request import BakeRequest
from offload_client.build.attachment import LOST
from offload_client.build.options import BuildOptions
from offload_client.connections import Connections
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from tests.fixtures.cutrelay import CutRelay
    from tests.fixtures.localcommand import SIZE, Command
    from tests.fixtures.nodepeer import NodePeer
else:
    from tests.fixtures.localcommand import SIZE


def lines(shown: str) -> list[int]:
    return [int(number) for number in re.findall(r"line (\d+)$", shown, re.MULTILINE)]


async def until_told(peer: NodePeer, standing: str) -> None:
    async with asyncio.timeout(20):
        while not peer.is_standing(standing):
            await asyncio.sleep(0.01)


async def test_no_line_is_lost_or_doubled(
    command: Command, peer: NodePeer, relay: CutRelay
) -> None:
    peer.remembers = True
    peer.lines, peer.line_pause = 600, 0.005
    building = asyncio.create_task(command.run())
    dice = random.Random(5)
    for _ in range(3):
        await asyncio.sleep(dice.uniform(0.5, 1.2))
        relay.cut()
    shown = await building
    assert lines(shown) == list(range(600))
    assert len(peer.created) == 1
    assert len(peer.rejoined) == shown.count(LOST) == 3
    assert peer.rejoined == sorted(peer.rejoined)
    assert "context canceled" not in shown
    assert not peer.canceled


async def test_context_goes_on_where_it_was_cut(
    command: Command, peer: NodePeer, relay: CutRelay
) -> None:
    peer.remembers = True
    digests = command.fill()
    dice = random.Random(7)
    relay.cut_after(*sorted(dice.randrange(20_000, SIZE) for _ in range(3)))
    shown = await command.run()
    assert relay.cuts == 3
    assert digests <= peer.receiver.blobs.keys()
    assert relay.up_bytes < SIZE + 3 * (3 << 20)
    assert len(peer.created) == 1
    assert shown.count(LOST) == 3
    assert not peer.canceled


async def test_build_that_was_lost_with_its_node_is_repeated(
    command: Command, peer: NodePeer, relay: CutRelay
) -> None:
    peer.remembers = peer.restarted = True
    peer.warning = b"careful"
    command.invocation.environment["BUILDX_METADATA_WARNINGS"] = "1"  # type: ignore[index]
    command.fill()
    relay.cut_after(5 << 20)
    metadata = command.context.parent / "metadata.json"
    shown = await command.run(metadata_file=str(metadata))
    assert len(peer.created) == 2
    assert len(json.loads(metadata.read_bytes())["buildx.build.warnings"]) == 1
    assert shown.count(LOST) == 1
    assert shown.count("trying again, what has arrived is not sent again") == 1
    peer.stop()


async def test_detached_build_prints_its_id_and_nothing_else(
    command: Command, peer: NodePeer
) -> None:
    peer.remembers = True
    peer.hold_after = 1
    command.fill()
    shown = await command.run(detach=True)
    assert command.printed.getvalue() == "build-1\n"
    assert "it goes on" not in shown
    assert "--detach waits: the build needs you for the build context" in shown
    assert "follow it with: offload attach build-1" in shown
    assert peer.left == 1
    assert not peer.canceled
    peer.stop()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"iidfile": "id"}, "--iidfile"),
        ({"metadata_file": "meta"}, "--metadata-file"),
    ],
)
async def test_detach_refuses_what_needs_the_end_of_the_build(
    command: Command, peer: NodePeer, options: dict[str, str], text: str
) -> None:
    with pytest.raises(InvalidValueError, match=f"cannot be used with {text}"):
        await command.run(detach=True, **options)
    assert not peer.created


async def test_cancelling_tells_the_node(command: Command, peer: NodePeer) -> None:
    peer.remembers = True
    peer.hold_after = 1
    building = asyncio.create_task(command.run())
    await until_told(peer, "independent")
    began = time.monotonic()
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert time.monotonic() - began < 2
    assert peer.canceled == ["by client"]
    peer.stop()


async def test_builds_of_a_bake_command_that_was_killed_go_on(
    command: Command, peer: NodePeer
) -> None:
    peer.remembers = True
    peer.hold_after = 1
    context = str(command.context)
    plan = BakePlan({"app": {"context": context}})
    options = {"app": BuildOptions(path=context)}
    request = BakeRequest(targets=["app"], progress="plain")
    async with Connections() as connections:
        run = BakeRun(command.invocation, request, plan, options, connections).run()
        baking = asyncio.create_task(run)
        await until_told(peer, "independent")
        await asyncio.sleep(0.3)
        # As the resident helper does for a command whose process is gone.
        command.invocation.interrupts.vanished = True
        baking.cancel()
        await asyncio.wait((baking,), timeout=10)
    assert (peer.left, peer.canceled) == (1, [])
    peer.stop()

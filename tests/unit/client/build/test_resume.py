"""A build whose connection breaks: it goes on by itself, and ends when that does not help."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import re
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from offload_builder.gateway.ca import CertificateAuthority
from offload_client.build import resume as module
from offload_client.build.options import BuildOptions
from offload_client.build.resume import PAUSES_SECONDS, Resume
from offload_client.build.runner import run_build
from offload_client.connections import Connections
from offload_client.identity import StoredIdentity, save_identity
from offload_client.invocation import Invocation
from offload_core.errors import GatewayUnreachableError, NodeLostError
from offload_core.tls import Identity
from tests.fixtures.cutrelay import CutRelay
from tests.fixtures.nodepeer import serving_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.fixtures.nodepeer import NodePeer

SIZE = 12 << 20
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


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.open(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def peer(authority: CertificateAuthority) -> AsyncIterator[NodePeer]:
    async with serving_node(authority.gateway_keys()) as running:
        yield running


@pytest.fixture
def relay(peer: NodePeer) -> Iterator[CutRelay]:
    with CutRelay(peer.address) as running:
        peer.address = running.address
        yield running


class Command:
    """One `offload-build` in this process."""

    def __init__(self, home: Path, authority: CertificateAuthority, gateway: str) -> None:
        self.context = home / "context"
        self.context.mkdir()
        (self.context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
        self.screen = io.StringIO()
        environment = {"HOME": str(home), "OFFLOAD_GATEWAY": gateway}
        self.invocation = Invocation([], home, environment, 0, io.StringIO(), self.screen)
        end = datetime.now(UTC) + timedelta(days=30)
        keys, expires = authority.issue_member(Identity("member", "ann", "t1", "member"), end)
        save_identity(self.invocation, gateway, StoredIdentity(keys, expires.timestamp()))

    def fill(self) -> set[bytes]:
        """Write small files and a large one; return the digests of the small ones."""
        digests = set()
        for number in range(60):
            content = os.urandom((SIZE - (6 << 20)) // 60)
            (self.context / str(number)).write_bytes(content)
            digests.add(hashlib.sha256(content).digest())
        (self.context / "large").write_bytes(os.urandom(6 << 20))
        return digests

    async def run(self, progress: str = "plain") -> str:
        """Build; return what was shown."""
        async with Connections() as connections:
            options = BuildOptions(path=str(self.context), progress=progress)
            await run_build(self.invocation, options, connections)
        return self.screen.getvalue()


@pytest.fixture
def command(tmp_path: Path, authority: CertificateAuthority, relay: CutRelay) -> Command:
    return Command(tmp_path, authority, relay.address)


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
    assert last["sha256:load"].get("error") is None


async def test_loss_without_progress_ends_after_five_attempts(
    command: Command, peer: NodePeer, relay: CutRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES_SECONDS", (0.01,) * 5)
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
    assert command.screen.getvalue().count(NOTICE) == 1


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

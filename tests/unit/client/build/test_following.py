"""Commands that look at builds which exist already, against a peer that speaks the contract."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_client.build.attachment import LOST
from offload_proto.v1.builds_service_pb2 import Build, BuildState

if TYPE_CHECKING:
    from tests.fixtures.cutrelay import CutRelay
    from tests.fixtures.localcommand import Command
    from tests.fixtures.nodepeer import NodePeer

MEMORY_LIMIT_KIB = 320 << 10
OFFLOAD = Path(sys.executable).parent / "offload"


async def offload(command: Command, *arguments: str) -> tuple[int, str, str, int]:
    """Run `offload`; return exit code, SHA-256 of stdout, stderr, and the peak of its memory."""

    def run() -> tuple[int, str, str, int]:
        digest = hashlib.sha256()
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                [OFFLOAD, *arguments], stdout=subprocess.PIPE, stderr=errors,
                env={**command.invocation.environment, "PATH": os.environ["PATH"]},
            ) as process:  # fmt: skip
                assert process.stdout is not None
                while data := process.stdout.read(1 << 20):
                    digest.update(data)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            shown = errors.read()
        return process.returncode, digest.hexdigest(), shown, usage.ru_maxrss

    return await asyncio.to_thread(run)


async def test_log_of_any_size_needs_bounded_memory(
    command: Command, peer: NodePeer, relay: CutRelay
) -> None:
    peer.logged_batches = 3000
    code, _, shown, peak_kib = await offload(command, "logs", "-f", "build-1")
    assert code == 0, shown
    assert relay.down_bytes > 100 << 20
    assert peak_kib < MEMORY_LIMIT_KIB


async def test_log_goes_on_after_a_cut(command: Command, peer: NodePeer, relay: CutRelay) -> None:
    peer.logged_batches = 300
    _, whole, _, _ = await offload(command, "logs", "-f", "build-1")
    relay.reset()
    following = asyncio.create_task(offload(command, "logs", "-f", "build-1"))
    async with asyncio.timeout(20):
        while relay.down_bytes < 4 << 20:
            await asyncio.sleep(0.002)
    relay.cut()
    code, again, shown, _ = await following
    assert (code, again) == (0, whole), shown


async def test_attach_comes_back_and_shows_every_line_once(
    command: Command, peer: NodePeer, relay: CutRelay
) -> None:
    peer.remembers = True
    peer.lines, peer.line_pause = 600, 0.01
    building = asyncio.create_task(command.run(detach=True))
    peer.located = Build(build_id="build-1", node_id="node-1", state=BuildState.BUILD_STATE_RUNNING)
    async with asyncio.timeout(20):
        await building
    looking = asyncio.create_task(offload(command, "attach", "--progress", "plain", "build-1"))
    async with asyncio.timeout(20):
        while not peer.rejoined:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    relay.cut()
    code, _, shown, _ = await looking
    assert code == 0, shown
    found = re.findall(r"line (\d+)$", shown, re.MULTILINE)
    assert found == [str(number) for number in range(600)]
    assert (shown.count(LOST), len(peer.rejoined), relay.cuts) == (1, 2, 1), shown[-300:]


async def test_attach_to_a_build_that_its_node_forgot_reads_the_record(
    command: Command, peer: NodePeer
) -> None:
    peer.logged_batches = 2
    peer.located = Build(
        build_id="build-1",
        node_id="node-1",
        state=BuildState.BUILD_STATE_FAILED,
        error="the-cause of it",
    )
    code, _, shown, _ = await offload(command, "attach", "--progress", "plain", "build-1")
    assert code == 1
    assert "the-cause of it" in shown
    assert shown.count("a line of the log") == 1000


@pytest.mark.parametrize("arguments", [("logs",), ("attach", "--progress", "plain")])
async def test_interrupt_ends_a_command_whose_reader_does_not_read(
    command: Command, peer: NodePeer, relay: CutRelay, arguments: tuple[str, ...]
) -> None:
    peer.logged_batches = 3000
    peer.located = Build(build_id="build-1", state=BuildState.BUILD_STATE_SUCCEEDED)
    with subprocess.Popen(
        [OFFLOAD, *arguments, "build-1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**command.invocation.environment, "PATH": os.environ["PATH"]},
    ) as process:  # fmt: skip
        try:
            received = -1
            async with asyncio.timeout(60):
                while received != relay.down_bytes or not received:
                    received = relay.down_bytes
                    await asyncio.sleep(1)
            process.send_signal(signal.SIGINT)
            if arguments[0] == "logs":
                await asyncio.to_thread(process.wait, 10)
            # What is said at the end goes to the same reader.
            await asyncio.to_thread(process.communicate, timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert received < 60 << 20


async def test_node_that_stays_away_is_said_once(command: Command, peer: NodePeer) -> None:
    peer.located = Build(build_id="build-1", node_id="node-1", state=BuildState.BUILD_STATE_RUNNING)
    peer.address = "127.0.0.1:1"
    looking = asyncio.create_task(offload(command, "attach", "--progress", "plain", "build-1"))
    await asyncio.sleep(8)
    peer.located.state = BuildState.BUILD_STATE_SUCCEEDED
    code, _, shown, _ = await looking
    assert code == 0, shown
    assert shown.count(LOST) == 1

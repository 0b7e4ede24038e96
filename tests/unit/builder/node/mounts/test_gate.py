"""Steps wait for the node's word, and run in any case."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.runcwrapper import write_runc_wrapper
from offload_builder.node.mounts.gate import Step, StepGate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CONFIG = json.dumps(
    {"process": {"args": ["x"], "capabilities": {"bounding": ["CAP_KILL", "CAP_NET_RAW"]}}},
    separators=(",", ":"),
)


class World:
    """A program in runc's place that appends to a file, and bundles for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.order = root / "order"
        self.runc = root / "real"
        self.runc.write_text(f"#!/bin/sh\necho ran >> {self.order}\n")
        self.runc.chmod(0o700)
        self.bundle = root / "bundle"
        self.bundle.mkdir()

    @asynccontextmanager
    async def step(self, gate: StepGate) -> AsyncIterator[asyncio.subprocess.Process]:
        (self.bundle / "config.json").write_text(CONFIG)
        program = write_runc_wrapper(self.root, self.runc, gate.shell)
        process = await asyncio.create_subprocess_exec(
            program, "run", "--bundle", self.bundle, "id"
        )
        try:
            yield process
            async with asyncio.timeout(10):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def capabilities(self) -> list[str]:
        found = json.loads((self.bundle / "config.json").read_text())
        return list(found["process"]["capabilities"]["bounding"])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_step_waits_for_the_word_and_its_end_is_seen(world: World) -> None:
    steps: list[Step] = []

    async def before(step: Step) -> None:
        await asyncio.sleep(0.2)
        world.order.write_text("before\n")
        steps.append(step)

    async with StepGate(world.root / "gate", before) as gate:
        async with world.step(gate):
            pass
        (step,) = steps
        async with asyncio.timeout(5):
            await step.ended.wait()
        assert step.bundle == world.bundle
    assert world.order.read_text() == "before\nran\n"
    assert world.capabilities() == ["CAP_KILL"]


async def test_step_runs_with_less_when_the_node_fails_or_is_gone(world: World) -> None:
    async def fail(_: Step) -> None:
        raise RuntimeError("broken")

    async with StepGate(world.root / "gate", fail) as gate:
        async with world.step(gate):
            pass
        assert world.capabilities() == ["CAP_KILL"]
    async with world.step(gate):
        pass
    assert world.capabilities() == ["CAP_KILL"]
    assert world.order.read_text() == "ran\nran\n"


async def test_step_that_waits_runs_when_the_node_closes_the_gate(world: World) -> None:
    begun = asyncio.Event()

    async def wait_for_ever(_: Step) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with StepGate(world.root / "gate", wait_for_ever) as gate:
        context = world.step(gate)
        await context.__aenter__()
        async with asyncio.timeout(10):
            await begun.wait()
    await context.__aexit__(None, None, None)
    assert world.capabilities() == ["CAP_KILL"]


async def test_step_that_was_not_heard_runs_when_the_node_closes_the_gate(world: World) -> None:
    async def never(_: Step) -> None:
        raise AssertionError("it was heard")

    async with StepGate(world.root / "gate", never) as gate:
        context = world.step(gate)
        await context.__aenter__()
        # The loop reads no pipe meanwhile.
        while not list((world.root / "gate").glob("replies/*.taken")):
            time.sleep(0.01)
        time.sleep(0.1)
    await context.__aexit__(None, None, None)
    assert world.capabilities() == ["CAP_KILL"]

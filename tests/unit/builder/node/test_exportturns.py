"""Exports of the cache let builds go first, but not for long."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node.exportturns import ExportTurns, builds_crowd

LONG_SECONDS = 60.0


class Export:
    """One export that runs until it is told to end."""

    def __init__(self, turns: ExportTurns) -> None:
        self.go, self.end, self.began = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._turns = turns
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._turns.turn(self.go):
            self.began.set()
            await self.end.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_export_begins_at_once_when_there_is_room():
    export = Export(ExportTurns(2, lambda: False, LONG_SECONDS))
    await asyncio.wait_for(export.began.wait(), 5)
    export.end.set()
    await export.task


async def test_export_waits_for_builds_to_end():
    crowded = True
    turns = ExportTurns(2, lambda: crowded, LONG_SECONDS)
    export = Export(turns)
    await settle()
    turns.look()
    await settle()
    assert not export.began.is_set()
    assert turns.open == 1
    crowded = False
    turns.look()
    await asyncio.wait_for(export.began.wait(), 5)
    export.end.set()
    await export.task
    assert turns.open == 0


async def test_export_does_not_wait_longer_than_its_patience():
    export = Export(ExportTurns(2, lambda: True, 0.05))
    await asyncio.wait_for(export.began.wait(), 5)
    export.end.set()
    await export.task


async def test_export_that_somebody_needs_begins_alone():
    turns = ExportTurns(2, lambda: True, LONG_SECONDS)
    needed, other = Export(turns), Export(turns)
    await settle()
    needed.go.set()
    await asyncio.wait_for(needed.began.wait(), 5)
    assert not other.began.is_set()
    needed.end.set()
    other.task.cancel()
    await asyncio.wait((needed.task, other.task))
    assert turns.open == 0


async def test_exports_beyond_the_slots_wait_for_their_turn():
    turns = ExportTurns(1, lambda: False, LONG_SECONDS)
    first = Export(turns)
    await asyncio.wait_for(first.began.wait(), 5)
    second = Export(turns)
    await settle()
    assert not second.began.is_set()
    first.end.set()
    await asyncio.wait_for(second.began.wait(), 5)
    second.end.set()
    await asyncio.wait((first.task, second.task))


@pytest.mark.parametrize(
    ("processors", "running", "crowd"), [(2, 1, False), (2, 2, True), (16, 8, False), (16, 9, True)]
)
def test_builds_crowd_when_they_need_more_than_half_of_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, running: int, crowd: bool
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    assert builds_crowd(running) is crowd

"""The journal: every viewer reads all batches in order, at its own pace."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from offload_builder.node.journal import Journal
from offload_proto.v1.events_pb2 import ProgressBatch, VertexLog


def batch(data: bytes) -> ProgressBatch:
    return ProgressBatch(logs=[VertexLog(vertex="v", data=data)])


async def read_all(journal: Journal, after: int = 0, pause: float = 0.0) -> list[tuple[int, bytes]]:
    found = []
    async with aclosing(journal.read(after)) as runs:
        async for batches in runs:
            found += [(item.sequence, item.logs[0].data) for item in batches]
            await asyncio.sleep(pause)
    return found


@given(sizes=st.lists(st.integers(0, 400_000), max_size=8), after=st.integers(0, 9))
def test_every_viewer_reads_every_batch_in_order(tmp_path_factory, sizes, after):
    async def work() -> None:
        path = tmp_path_factory.mktemp("journal") / "log"
        contents = [os.urandom(min(size, 64)) + bytes(max(0, size - 64)) for size in sizes]
        with Journal(path) as journal:
            half = len(contents) // 2
            for data in contents[:half]:
                assert journal.append(batch(data))
            viewers = [
                asyncio.ensure_future(read_all(journal)),
                asyncio.ensure_future(read_all(journal, pause=0.001)),
                asyncio.ensure_future(read_all(journal, after)),
            ]
            await asyncio.sleep(0)
            for data in contents[half:]:
                assert journal.append(batch(data))
                await asyncio.sleep(0)
            journal.finish()
            late = asyncio.ensure_future(read_all(journal))
            everything = list(enumerate(contents, 1))
            assert await viewers[0] == await viewers[1] == await late == everything
            assert await viewers[2] == everything[after:]
        assert not path.exists()

    asyncio.run(work())


async def test_slow_viewer_reads_to_the_end_although_the_journal_is_removed(tmp_path):
    journal = Journal(tmp_path / "log")
    for number in range(100):
        journal.append(batch(b"%d" % number * 10_000))
    async with aclosing(journal.read()) as runs:
        seen = len(await anext(runs))
        before = len(list(Path("/proc/self/fd").iterdir()))
        journal.remove()
        assert not (tmp_path / "log").exists()
        async for batches in runs:
            seen += len(batches)
    assert seen == 100
    assert len(list(Path("/proc/self/fd").iterdir())) < before
    assert await read_all(journal) == []


async def test_nothing_is_taken_after_the_end(tmp_path):
    with Journal(tmp_path / "log") as journal:
        journal.append(batch(b"one"))
        journal.finish()
        assert journal.append(batch(b"two"))
        assert await read_all(journal) == [(1, b"one")]
        assert journal.sequence == 1

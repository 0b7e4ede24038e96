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


async def test_large_output_is_compressed_and_reads_as_written(tmp_path):
    lines = [b"".join(b"line %d\n" % number for number in range(start, start + 20_000))
             for start in range(0, 100_000, 20_000)]  # fmt: skip
    with Journal(tmp_path / "log") as journal:
        for data in lines:
            assert journal.append(batch(data))
        size = (tmp_path / "log").stat().st_size
        assert size < sum(map(len, lines)) / 3
        journal.finish()
        assert await read_all(journal) == list(enumerate(lines, 1))


async def test_a_viewer_is_given_little_at_a_time_however_well_it_was_compressed(tmp_path):
    with Journal(tmp_path / "log") as journal:
        for _ in range(200):
            journal.append(batch(bytes(100_000)))
        journal.finish()
        async with aclosing(journal.read()) as runs:
            sizes = [sum(len(item.logs[0].data) for item in run) async for run in runs]
    assert sum(sizes) == 200 * 100_000
    assert max(sizes) <= 400_000


async def test_what_a_killed_process_left_is_read_as_far_as_it_is_whole(tmp_path: Path):
    path = tmp_path / "log"
    journal = Journal(path)
    for data in (b"a", b"b", b"c"):
        assert journal.append(batch(data))
    journal.close()
    whole = path.read_bytes()
    for check in (True, False):
        with Journal.restored(path, check=check) as found:
            assert await read_all(found, after=1) == [(2, b"b"), (3, b"c")]
        assert not path.exists()
        path.write_bytes(whole)
    for torn in (whole[:-1], whole[:-3] + b"xxx", whole + b"\0\0"):
        path.write_bytes(torn)
        with Journal.restored(path, check=True) as found:
            assert [number for number, _ in await read_all(found)][:2] == [1, 2]
            assert found.sequence == (3 if torn.startswith(whole) else 2)


def test_journal_that_is_closed_stays_on_the_disk(tmp_path: Path):
    journal = Journal(tmp_path / "log")
    assert journal.append(batch(b"a"))
    journal.close()
    assert (tmp_path / "log").stat().st_size > 0


async def test_who_comes_back_reads_on_after_any_batch(tmp_path: Path):
    path = tmp_path / "log"
    journal = Journal(path)
    contents = [(number, b"%d" % number) for number in range(1, 301)]
    for _, data in contents:
        assert journal.append(batch(data))
    for after in (-1, 0, 1, 63, 64, 65, 127, 128, 299, 300, 301, 1 << 62):
        journal.finish()
        assert await read_all(journal, after) == contents[max(0, after) :]
    journal.close()
    with Journal.restored(path, check=False) as found:
        for after in (0, 63, 64, 200, 300):
            assert await read_all(found, after) == contents[after:]


async def test_who_comes_back_makes_nobody_wait_for_what_was_read_before(tmp_path, monkeypatch):
    read_bytes = 0
    pread = os.pread

    def counting(file: int, size: int, offset: int) -> bytes:
        nonlocal read_bytes
        data = pread(file, size, offset)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(os, "pread", counting)
    with Journal(tmp_path / "log") as journal:
        for _ in range(1000):
            assert journal.append(batch(os.urandom(10_000)))
        journal.finish()
        assert [number for number, _ in await read_all(journal, 999)] == [1000]
        assert read_bytes < 1_000_000

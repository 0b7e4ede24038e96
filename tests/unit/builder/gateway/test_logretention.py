"""Output of ended builds goes by age and by bytes; the builds stay."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

import pytest

from offload_builder.gateway.history import BuildRecord, History
from offload_builder.gateway.log_book import LogBook
from offload_builder.gateway.logretention import GONE, LogRetention
from offload_builder.gateway.store import Store, default_url
from offload_proto.v1 import builds_service_pb2 as builds_pb
from offload_proto.v1 import events_pb2 as events_pb

NOW = datetime.now(UTC).replace(microsecond=0)
NAMES = [f"{letter}{'a' * 11}" for letter in "abcd"]


@pytest.fixture
async def store(tmp_path):
    async with Store(default_url(tmp_path)) as store:
        yield store


async def fill(store: Store, *, running: str = "") -> None:
    """Make builds that ended 40, 30, 20 and 10 days ago, each with 100 kB that do not shrink."""
    history, book = History(store), LogBook(store, 1 << 30)
    for number, name in enumerate(NAMES):
        ended = NOW - timedelta(days=10 * (4 - number))
        state = builds_pb.BUILD_STATE_SUCCEEDED
        await history.insert(
            BuildRecord(
                build_id=name,
                request_id=name,
                project_id="p",
                member="m",
                token_id="t",
                role=1,
                name="n",
                state=builds_pb.BUILD_STATE_RUNNING if name == running else state,
                created_at=ended,
                completed_at=None if name == running else ended,
            )
        )
        batches = [events_pb.ProgressBatch(sequence=number) for number in (1, 2)]
        for batch in batches:
            batch.logs.add(vertex="v", data=os.urandom(50_000))
        await book.append(name, batches)
        await book.flush()


async def kept(store: Store) -> list[str]:
    """Return the builds whose output is whole; the others say that it is gone."""
    found = []
    for name in NAMES:
        read = [
            batch
            async for run in LogBook(store, 1).read(name, after=0, follow=False, ended=lambda: True)
            for batch in run
        ]
        if any(batch.logs for batch in read):
            assert [batch.sequence for batch in read] == [1, 2]
            found.append(name)
        else:
            assert [batch.sequence for batch in read] == [2]
            assert [warning.short for warning in read[0].warnings] == [GONE]
    return found


async def test_output_goes_with_age(store):
    await fill(store)
    retention = LogRetention(store, keep_bytes=0, retention_seconds=25 * 86400)
    assert await retention.sweep() == 2
    assert await kept(store) == NAMES[2:]
    assert await retention.sweep() == 0


async def test_output_that_ended_first_goes_when_there_is_too_much(store):
    await fill(store)
    retention = LogRetention(store, keep_bytes=250_000, retention_seconds=0)
    assert await retention.sweep() == 2
    assert await kept(store) == NAMES[2:]
    assert await retention.sweep() == 0
    page, _ = await History(store).page((), size=9, token="")
    assert len(page) == 4


async def test_output_of_a_running_build_stays(store):
    await fill(store, running=NAMES[0])
    assert await LogRetention(store, keep_bytes=1, retention_seconds=1).sweep() == 3
    assert await kept(store) == NAMES[:1]


async def test_without_bounds_everything_stays(store):
    await fill(store)
    assert await LogRetention(store, keep_bytes=0, retention_seconds=0).sweep() == 0
    assert await kept(store) == NAMES


async def test_output_that_a_node_sends_again_after_its_removal_is_dropped(store):
    await fill(store)
    await LogRetention(store, keep_bytes=1, retention_seconds=0).sweep()
    book = LogBook(store, 1 << 30)
    again = [events_pb.ProgressBatch(sequence=number) for number in (1, 2)]
    again[0].logs.add(vertex="v", data=b"again")
    await book.append(NAMES[0], again)
    await book.flush()
    assert await kept(store) == []

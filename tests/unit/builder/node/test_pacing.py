"""The pacer: output that comes quickly is joined, nothing is lost, nothing waits long."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from offload_builder.node.pacing import BATCH_BYTES, Pacer
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex, VertexLog


def printed(data: bytes) -> ProgressBatch:
    return ProgressBatch(logs=[VertexLog(vertex="v", stream=1, data=data)])


async def test_first_output_is_passed_on_at_once_and_what_follows_soon():
    passed: list[ProgressBatch] = []
    pacer = Pacer(passed.append)
    for number in range(100):
        pacer.add(printed(b"%d\n" % number))
    assert len(passed) == 1
    await asyncio.sleep(0.1)
    assert len(passed) == 2
    data = b"".join(log.data for batch in passed for log in batch.logs)
    assert data == b"".join(b"%d\n" % number for number in range(100))


async def test_news_of_steps_does_not_wait():
    passed: list[ProgressBatch] = []
    pacer = Pacer(passed.append)
    pacer.add(printed(b"one"))
    pacer.add(printed(b"two"))
    pacer.add(ProgressBatch(vertices=[Vertex(digest="v", name="ended")]))
    assert [len(batch.logs) for batch in passed] == [1, 1]
    assert passed[1].vertices[0].name == "ended"


async def test_output_is_dense_only_while_it_comes_quickly():
    pacer = Pacer(lambda batch: None)
    pacer.add(printed(b"one"))
    assert not pacer.dense
    pacer.add(printed(b"two"))
    assert pacer.dense
    pacer.add(ProgressBatch(vertices=[Vertex(digest="v")]))
    assert not pacer.dense
    await asyncio.sleep(0.05)
    pacer.add(printed(b"three"))
    assert not pacer.dense


async def test_large_output_does_not_wait():
    passed: list[ProgressBatch] = []
    pacer = Pacer(passed.append)
    pacer.add(printed(b"x"))
    pacer.add(printed(bytes(BATCH_BYTES)))
    assert len(passed) == 2


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.none(), st.just("pause"), st.just("big"))),
)
def test_order_is_kept_and_nothing_is_lost(news):
    async def work() -> None:
        passed: list[ProgressBatch] = []
        pacer = Pacer(passed.append)
        expected, steps = b"", 0
        for item in news:
            if item == "pause":
                await asyncio.sleep(0)
            elif item is None:
                steps += 1
                pacer.add(ProgressBatch(vertices=[Vertex(digest=str(steps))]))
            else:
                data = bytes(BATCH_BYTES) if item == "big" else item
                expected += data
                pacer.add(printed(data))
        pacer.flush()
        assert b"".join(log.data for batch in passed for log in batch.logs) == expected
        digests = [vertex.digest for batch in passed for vertex in batch.vertices]
        assert digests == [str(number) for number in range(1, steps + 1)]

    asyncio.run(work())

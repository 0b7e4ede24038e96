"""BuildKit's progress as ours: quick writes become one piece, and every byte stays in its order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload_builder.buildkit.status import MERGED_BYTES, progress_batch
from offload_proto.buildkit import control_pb2 as control

Write = tuple[str, int, int, bytes]


def message(writes: list[Write]) -> bytes:
    response = control.StatusResponse()
    for vertex, stream, nanoseconds, data in writes:
        log = response.logs.add(vertex=vertex, stream=stream, msg=data)
        log.timestamp.seconds, log.timestamp.nanos = divmod(nanoseconds, 10**9)
    return response.SerializeToString()


def test_writes_within_a_millisecond_become_one_piece_with_the_time_of_the_first():
    writes = [("v", 1, 5_000_000_000 + 100_000 * number, b"%d\n" % number) for number in range(25)]
    logs = progress_batch(message(writes)).logs
    assert [log.data.count(b"\n") for log in logs] == [10, 10, 5]
    assert [log.timestamp.nanos for log in logs] == [0, 1_000_000, 2_000_000]


def test_streams_and_steps_stay_apart():
    writes = [("v", 1, 0, b"a"), ("v", 2, 0, b"b"), ("w", 2, 0, b"c"), ("w", 2, 0, b"d")]
    logs = progress_batch(message(writes)).logs
    assert [(log.vertex, log.stream, log.data) for log in logs] == [
        ("v", 1, b"a"),
        ("v", 2, b"b"),
        ("w", 2, b"cd"),
    ]


def test_pieces_stay_small():
    writes = [("v", 1, 0, bytes(MERGED_BYTES // 2 + 1))] * 3
    assert len(progress_batch(message(writes)).logs) == 3


@given(
    st.lists(
        st.tuples(st.sampled_from("vw"), st.integers(1, 2), st.integers(0, 5_000_000), st.binary())
    )
)
def test_every_byte_of_every_stream_comes_in_its_order(writes):
    writes.sort(key=lambda write: write[2])
    flat = [
        (log.vertex, log.stream, byte)
        for log in progress_batch(message(writes)).logs
        for byte in log.data
    ]
    assert flat == [(vertex, stream, byte) for vertex, stream, _, data in writes for byte in data]

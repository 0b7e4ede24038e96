from __future__ import annotations

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from offload_builder.buildkit.h2 import frames
from offload_builder.buildkit.h2.frames import FrameReader, ProtocolError
from offload_builder.buildkit.h2.headers import HeaderDecoder, HeaderEncoder
from offload_builder.buildkit.h2.messages import (
    GrpcError,
    MessageReader,
    message_prefix,
    status_of,
    status_trailers,
    varint,
)

a_frame = st.tuples(
    st.integers(0, 9), st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=300)
)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split bytes at the given positions, modulo the length."""
    points = sorted({point % (len(data) + 1) for point in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(points)]


@hypothesis.given(st.lists(a_frame, max_size=20), st.lists(st.integers(0, 10_000), max_size=30))
def test_frames_survive_any_cutting(items, cuts):
    data = b"".join(frames.frame(*item) for item in items)
    reader = FrameReader()
    found = [item for piece in cut(data, cuts) for item in reader.feed(piece)]
    assert found == items


def test_a_frame_that_is_too_large_is_refused_before_its_payload():
    reader = FrameReader(max_frame=100)
    with pytest.raises(ProtocolError) as caught:
        list(reader.feed(frames.frame_header(101, frames.DATA, 0, 1)))
    assert caught.value.code == frames.FRAME_SIZE_ERROR


@pytest.mark.parametrize("payload", [b"", b"\x05abc"])
def test_padding_beyond_the_payload_is_refused(payload):
    with pytest.raises(ProtocolError):
        frames.strip_padding(frames.PADDED, payload)


def test_padding_and_priority_are_removed():
    payload = b"\x02" + b"prio5" + b"text" + b"\0\0"
    flags = frames.PADDED | frames.PRIORITY_FIELDS
    assert frames.strip_padding(flags, payload) == b"text"


header_text = st.text(st.characters(codec="ascii", min_codepoint=0x20, max_codepoint=0x7E))


@hypothesis.given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z-]{0,20}", fullmatch=True),
            header_text.map(str.strip),
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 200),
)
def test_header_blocks_survive_continuation(headers, size):
    encoder, decoder, reader = HeaderEncoder(), HeaderDecoder(), FrameReader()
    encoder.max_frame = size
    for _ in range(2):  # The second block uses what the first left in the tables.
        block = None
        for kind, flags, stream_id, payload in reader.feed(
            encoder.encode(7, headers, end_stream=True)
        ):
            assert block is None
            take = decoder.begin if kind == frames.HEADERS else decoder.go_on
            block = take(flags, stream_id, payload)
        assert block == (7, headers, True)
        assert not decoder.pending


def test_continuation_of_another_stream_is_refused():
    decoder = HeaderDecoder()
    assert decoder.begin(0, 1, b"\x82") is None
    with pytest.raises(ProtocolError):
        decoder.go_on(frames.END_HEADERS, 3, b"")


@hypothesis.given(
    st.lists(st.binary(max_size=2000), max_size=20), st.lists(st.integers(0, 50_000), max_size=30)
)
def test_messages_survive_any_cutting(messages, cuts):
    data = b"".join(message_prefix(len(item)) + item for item in messages)
    reader = MessageReader()
    found = [item for piece in cut(data, cuts) for item in reader.feed(piece)]
    assert found == messages
    assert not reader.partial


def test_a_message_above_the_limit_is_refused():
    with pytest.raises(GrpcError):
        MessageReader().feed(message_prefix(17 * 2**20))


@hypothesis.given(st.integers(1, 16), st.text(max_size=300), st.binary(max_size=300))
def test_a_status_survives_its_trailers(code, text, details):
    hypothesis.assume(all(not 0xD800 <= ord(letter) <= 0xDFFF for letter in text))
    trailers = status_trailers(code, text, details)
    assert all(value.isascii() and value.isprintable() for _, value in trailers)
    error = status_of(trailers)
    assert error is not None
    assert (error.code, error.message, error.details) == (code, text, details)


def test_trailers_without_a_status_are_an_error():
    error = status_of([(":status", "502")])
    assert error is not None
    assert "502" in error.message


@pytest.mark.parametrize(("value", "encoded"), [(0, b"\0"), (127, b"\x7f"), (300, b"\xac\x02")])
def test_varint(value, encoded):
    assert varint(value) == encoded

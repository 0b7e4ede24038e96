"""The framing of the SSH agent protocol."""

from __future__ import annotations

import pytest

from offload_core.errors import UsageError
from offload_core.sshagent import (
    MAX_FRAME_BYTES,
    FrameReader,
    frame,
    frame_body,
    frame_kind,
    string,
    take_string,
)


def test_frames_are_whole_however_their_bytes_come():
    sent = [frame(11), frame(13, string(b"key"), string(b"data")), frame(5)]
    stream = b"".join(sent)
    for size in (1, 3, 7, len(stream)):
        reader, found = FrameReader(), []
        for start in range(0, len(stream), size):
            found += reader.feed(stream[start : start + size])
        assert found == sent
        assert not reader.partial


def test_frame_that_no_agent_would_take_is_refused_before_it_is_kept():
    for size in (0, MAX_FRAME_BYTES + 1):
        with pytest.raises(UsageError):
            FrameReader().feed(size.to_bytes(4, "big"))


def test_strings_of_a_frame_are_read_back_and_cut_ones_refused():
    message = frame(13, string(b"key"), string(b""))
    assert frame_kind(message) == 13
    key, rest = take_string(frame_body(message))
    assert (key, take_string(rest)) == (b"key", (b"", b""))
    with pytest.raises(UsageError):
        take_string(b"\x00\x00\x00\x05abc")

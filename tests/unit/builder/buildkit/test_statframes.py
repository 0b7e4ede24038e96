"""STAT packets: what BuildKit reads of an entry, and that we read the same."""

from __future__ import annotations

import pytest

from offload_builder.buildkit.h2.messages import MessageReader
from offload_builder.buildkit.statframes import NO_CONTENT, read_frames, stat_frames
from offload_core.filemode import MODE_DIR, MODE_NAMED_PIPE, MODE_SOCKET, MODE_SYMLINK
from offload_core.listing import Page
from offload_proto.buildkit.fsutil_pb2 import Packet


def packets(frames: bytes) -> list[Packet]:
    reader = MessageReader()
    found = [Packet.FromString(message) for message in reader.feed(frames)]
    assert not reader.partial
    return found


def test_every_kind_of_entry_is_told_as_fsutil_expects_it():
    page = Page(
        ["d", "d/f", "d/hard", "empty", "link", "pipe", "s", "x" * 3000],
        [MODE_DIR | 0o755, 0o644, 0o644, 0o600, MODE_SYMLINK | 0o777, MODE_NAMED_PIPE | 0o644,
         MODE_SOCKET | 0o755, 0o644],
        [0, 7, 0, 0, 0, 0, 0, 2**40],
        bytes(64),
        {2: "d/f", 4: "zïel"},
        {1: {"user.x": b"1"}, 0: {"user.d": b""}},
    )  # fmt: skip
    times = [1, 1_700_000_000_123_456_789, 3, -4, 5, 6, 7, 8]
    told = packets(stat_frames(page, times))
    assert [packet.type for packet in told] == [Packet.PACKET_STAT] * 8
    stats = [packet.stat for packet in told]
    assert [stat.path for stat in stats] == page.paths
    assert [stat.modTime for stat in stats] == times
    # A symbolic link has the size that lstat says, a hard link none.
    assert [stat.size for stat in stats] == [0, 7, 0, 0, 5, 0, 0, 2**40]
    assert [stat.linkname for stat in stats] == ["", "", "d/f", "", "zïel", "", "", ""]
    assert [stat.mode for stat in stats][:6] == page.modes[:6]
    assert stats[6].mode == 0o755
    assert {(stat.uid, stat.gid) for stat in stats} == {(0, 0)}
    assert dict(stats[1].xattrs) == {"user.x": b"1"}
    assert dict(stats[0].xattrs) == {"user.d": b""}


@pytest.mark.parametrize("length", [*range(100, 130), 4096])
def test_what_was_told_can_be_read_again(length):
    page = Page(["a", "b" * length, "c"], [0o644, 0o755, MODE_DIR | 0o700], [0, 9, 0], bytes(32))
    entries = read_frames(stat_frames(page, [5, 6, 7]))
    assert [entry.path for entry in entries] == page.paths
    assert [entry.modified_at_ns for entry in entries] == [5, 6, 7]
    assert [entry.content_size for entry in entries] == [0, 9, NO_CONTENT]

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from offload_cache.packs.catalog import FramePlace
from offload_cache.packs.pending import MAX_PENDING_BYTES, PendingBlobs
from offload_cache.packs.reader import join_frames

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def frames(pack: str, *places: tuple[float, float]) -> list[FramePlace]:
    """Return frames that begin and end at these MiB."""
    return [
        FramePlace(pack, int(start * MIB), int((end - start) * MIB), MIB, raw=False)
        for start, end in places
    ]


def test_neighbouring_frames_are_read_with_one_request() -> None:
    places = frames("a", (0, 1), (1, 2), (2.125, 3)) + frames("b", (3, 4))
    joined = [(part.pack, part.start, part.end, len(part.frames)) for part in join_frames(places)]
    assert joined == [("a", 0, 3 * MIB, 3), ("b", 3 * MIB, 4 * MIB, 1)]


def test_a_request_is_bounded_but_for_one_large_frame() -> None:
    places = frames("a", (0, 2), (2, 4), (4, 5), (5, 13))
    assert [part.end - part.start for part in join_frames(places)] == [4 * MIB, MIB, 8 * MIB]


def test_large_gaps_are_not_read() -> None:
    assert [part.end for part in join_frames(frames("a", (0, 0.5), (2, 2.5)))] == [
        MIB // 2,
        5 * MIB // 2,
    ]


def test_blobs_wait_in_their_order(tmp_path: Path) -> None:
    names = [os.urandom(32) for _ in range(10)]
    pending = PendingBlobs(tmp_path / "pending")
    pending.add(names[:4])
    pending.add(names[4:])
    assert pending.take(3) == names[:3]
    assert pending.take(3) == names[3:6]
    pending.give_back(names[2:6])
    assert len(pending) == 8
    assert pending.take(100) == names[2:]
    assert not pending
    assert pending.take(1) == []


def test_waiting_blobs_are_kept_over_a_restart(tmp_path: Path) -> None:
    names = [os.urandom(32) for _ in range(10)]
    pending = PendingBlobs(tmp_path / "pending")
    pending.add(names)
    pending.save(pending.snapshot())
    again = PendingBlobs(tmp_path / "pending")
    again.load()
    assert again.take(100) == names
    again.save(again.snapshot())
    assert list(tmp_path.iterdir()) == []


def test_a_torn_file_of_waiting_blobs_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "pending").write_bytes(bytes(32) + b"rest")
    pending = PendingBlobs(tmp_path / "pending")
    pending.load()
    assert pending.take(100) == [bytes(32)]


def test_far_too_many_waiting_blobs_are_dropped(tmp_path: Path) -> None:
    pending = PendingBlobs(tmp_path / "pending")
    many = [bytes(32)] * (MAX_PENDING_BYTES // 32)
    pending.add(many)
    pending.add(many[:5])
    assert (len(pending), pending.dropped) == (len(many), 5)

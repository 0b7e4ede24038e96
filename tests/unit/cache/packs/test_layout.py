from __future__ import annotations

import hashlib
import os
import struct
import time

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from offload_cache.packs.layout import (
    DamagedPackError,
    Frame,
    PackIndex,
    decode_index,
    encode_index,
    frame_compressor,
    new_pack_name,
    pack_frame,
    pack_made_at,
    unpack_frame,
)


def index_of(frames: list[list[int]]) -> PackIndex:
    """Return an index of frames of blobs of these sizes, stored raw."""
    sizes = [size for frame in frames for size in frame]
    return PackIndex(
        [Frame(sum(frame), sum(frame), len(frame), True) for frame in frames],
        sizes,
        b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(len(sizes))),
    )


@given(st.lists(st.lists(st.integers(1, 100_000), min_size=1, max_size=20), max_size=20))
def test_an_index_is_read_as_it_was_written(frames: list[list[int]]) -> None:
    index = index_of(frames)
    assert decode_index(encode_index(index)) == index


def test_blobs_follow_each_other_in_frames_and_frames_in_the_pack() -> None:
    index = index_of([[5, 7], [11]])
    places = [(number, position, size) for _, number, position, size in index.blobs()]
    assert places == [(0, 0, 5), (0, 5, 7), (1, 0, 11)]
    assert index.offsets() == [0, 12]
    assert index.stored_bytes == 23


@given(st.binary(max_size=300))
def test_noise_is_no_index(noise: bytes) -> None:
    with pytest.raises(DamagedPackError):
        decode_index(noise)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_of_an_index_is_noticed(at: int, change: int) -> None:
    data = bytearray(encode_index(index_of([[5, 7], [11]])))
    # The first bytes of a zstd frame say how it is made; a change may leave its meaning.
    at = 6 + at % (len(data) - 6)
    data[at] ^= change
    with pytest.raises(DamagedPackError):
        decode_index(bytes(data))


@pytest.mark.parametrize(
    "index",
    [
        PackIndex([Frame(5, 5, 1, True)], [6], bytes(32)),
        PackIndex([Frame(5, 5, 2, True)], [5], bytes(32)),
        PackIndex([Frame(5, 6, 1, True)], [6], bytes(32)),
        PackIndex([], [5], bytes(32)),
        PackIndex([Frame(9, 1 << 30, 1, False)], [1 << 30], bytes(32)),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(index: PackIndex) -> None:
    with pytest.raises(DamagedPackError):
        decode_index(encode_index(index))


def test_an_index_of_impossible_size_is_not_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(DamagedPackError, match="size"):
        decode_index(bomb)


def test_a_count_that_no_index_has_is_refused() -> None:
    header = struct.pack("<8sII", b"obpack\x00\x01", 0xFFFFFFFF, 0xFFFFFFFF)
    with pytest.raises(DamagedPackError):
        decode_index(zstandard.ZstdCompressor().compress(header))


@pytest.mark.parametrize("data", [b"text " * 5000, os.urandom(5000)])
def test_a_frame_is_unpacked_as_it_was_packed(data: bytes) -> None:
    stored, raw = pack_frame(data, frame_compressor())
    assert raw == (len(stored) == len(data))
    assert unpack_frame(stored, len(data), raw=raw) == data


def test_a_frame_that_unpacks_to_another_size_is_refused() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    for data, raw in ((bomb, False), (b"noise", False), (b"noise", True)):
        with pytest.raises(DamagedPackError):
            unpack_frame(data, 100, raw=raw)


def test_names_sort_by_their_time() -> None:
    first = new_pack_name()
    time.sleep(0.002)
    second = new_pack_name()
    assert first < second
    assert abs(pack_made_at(second) - time.time()) < 5
    assert pack_made_at("zzz") == 0

"""Pages of listings and chunk lists: what both sides must read alike."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_core.chunklist import (
    CHUNKED_ABOVE_BYTES,
    MAX_CHUNK_BYTES,
    Chunk,
    decode_chunks,
    encode_chunks,
    is_chunked,
    offsets,
)
from offload_core.errors import UsageError
from offload_core.filemode import MODE_DEVICE, MODE_DIR, MODE_SYMLINK
from offload_core.listing import (
    MAX_PAGE_ENTRIES,
    MIN_PAGE_ENTRIES,
    Page,
    begins_page,
    decode_page,
    deltas,
    encode_page,
    from_deltas,
)
from offload_proto.v1.node_service_pb2 import EntryLink, ListingPage

DIGESTS = [hashlib.sha256(bytes([number])).digest() for number in range(4)]


def page() -> Page:
    return Page(
        ["d", "d/datei-ä", "d/dev", "d/empty", "d/hard", "d/link", "e"],
        [MODE_DIR | 0o755, 0o644, MODE_DEVICE | 0o600, 0o644, 0o644, MODE_SYMLINK | 0o777, 0o755],
        [0, 5, 0, 0, 0, 0, 7],
        DIGESTS[0] + DIGESTS[1],
        links={4: "d/datei-ä", 5: "../x"},
        xattrs={1: {"user.b": b"2", "user.a": b"1"}},
        devices={2: (8, 1)},
    )


def test_a_page_is_read_as_it_was_written():
    found = decode_page(encode_page(page()))
    assert found == page()
    assert found.digest_list() == [b"", DIGESTS[0], b"", b"", b"", b"", DIGESTS[1]]


def test_equal_entries_have_one_name_whatever_the_order_of_their_attributes():
    other = page()
    other.xattrs = {1: {"user.a": b"1", "user.b": b"2"}}
    assert encode_page(other) == encode_page(page())


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message.modes.append(1),
        lambda message: message.sizes_bytes.pop(),
        lambda message: message.links.append(EntryLink(entry=7, target="x")),
        lambda message: setattr(message, "digests", message.digests[:-1]),
        lambda message: setattr(message, "digests", message.digests + DIGESTS[2]),
        lambda message: setattr(message, "paths", b"\xff" + message.paths[1:]),
        lambda message: setattr(message, "paths", b""),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(change):
    message = ListingPage.FromString(encode_page(page()))
    change(message)
    with pytest.raises(UsageError, match="damaged listing"):
        decode_page(message.SerializeToString())


def test_a_page_with_too_many_entries_is_refused():
    count = MAX_PAGE_ENTRIES + 1
    data = encode_page(Page([f"f{n:05d}" for n in range(count)], [0o644] * count, [0] * count, b""))
    with pytest.raises(UsageError):
        decode_page(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_refused(data):
    try:
        found = decode_page(data)
    except UsageError:
        return
    assert len(found.digest_list()) == len(found)


def cut(paths):
    pages, current = [], []
    for path in paths:
        if begins_page(path, len(current)):
            pages.append(current)
            current = []
        current.append(path)
    return [*pages, current]


def test_pages_have_their_bounds():
    sizes = [len(part) for part in cut([f"src/f{n:06d}.py" for n in range(20_000)])]
    assert max(sizes) <= MAX_PAGE_ENTRIES
    assert min(sizes[:-1]) >= MIN_PAGE_ENTRIES
    assert 100 < sum(sizes) / len(sizes) < 300


@given(st.integers(0, 4999))
def test_a_new_path_changes_few_pages(position):
    paths = [f"src/f{n:06d}.py" for n in range(5000)]
    before = {tuple(part) for part in cut(paths)}
    after = {tuple(part) for part in cut([*paths[:position], "src/new", *paths[position:]])}
    assert len(after - before) <= 4


@given(st.lists(st.integers(-(2**40), 2**62)))
def test_times_travel_as_differences(times):
    assert from_deltas(deltas(times)) == times


def test_a_chunk_list_is_read_as_it_was_written():
    chunks = [Chunk(DIGESTS[0], 5), Chunk(DIGESTS[1], MAX_CHUNK_BYTES), Chunk(DIGESTS[2], 1)]
    size = 6 + MAX_CHUNK_BYTES
    assert decode_chunks(encode_chunks(chunks), size) == chunks
    assert offsets(chunks) == [0, 5, 5 + MAX_CHUNK_BYTES]


@pytest.mark.parametrize(
    ("chunks", "size"),
    [
        ([Chunk(DIGESTS[0], 5)], 6),
        ([Chunk(DIGESTS[0], 0), Chunk(DIGESTS[0], 5)], 5),
        ([Chunk(DIGESTS[0], MAX_CHUNK_BYTES + 1)], MAX_CHUNK_BYTES + 1),
    ],
)
def test_a_chunk_list_that_does_not_fit_its_file_is_refused(chunks, size):
    with pytest.raises(UsageError, match="does not fit"):
        decode_chunks(encode_chunks(chunks), size)


def test_a_cut_chunk_list_is_refused():
    with pytest.raises(UsageError, match="damaged chunk list"):
        decode_chunks(encode_chunks([Chunk(DIGESTS[0], 5)])[:-1], 5)


def test_only_the_size_says_whether_a_file_is_chunked():
    assert not is_chunked(CHUNKED_ABOVE_BYTES)
    assert is_chunked(CHUNKED_ABOVE_BYTES + 1)

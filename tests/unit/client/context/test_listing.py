"""Pages hold exactly what was added, and a change elsewhere leaves them as they were."""

from __future__ import annotations

import hashlib
import os
import threading
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_client.context.entries import ContextItem, FileRun, TreeEntry, tree_entries
from offload_client.context.listing import ClientListing
from offload_client.context.scan import scan_context
from offload_client.context.source import ListedContent
from offload_core.errors import ContextError, UsageError
from offload_core.filemode import (
    MODE_CHAR_DEVICE,
    MODE_DEVICE,
    MODE_DIR,
    MODE_SYMLINK,
    is_regular,
)
from offload_core.listing import MAX_PAGE_ENTRIES, MIN_PAGE_ENTRIES, begins_page, decode_page


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _listing(items: list[ContextItem]) -> ClientListing:
    listing = ClientListing()
    for item in items:
        listing.add(item)
    listing.finish()
    return listing


def _file(path: str, size: int = 1, mtime: int = 0) -> TreeEntry:
    return TreeEntry(path, 0o644, size, mtime, sha256=_digest(path))


def _entries(listing: ClientListing) -> list[TreeEntry]:
    """Read the pages as the other side does."""
    found = []
    for listed in listing.pages:
        assert hashlib.sha256(listed.data).digest() == listed.digest
        page = decode_page(listed.data)
        digests = page.digest_list()
        for number, path in enumerate(page.paths):
            major, minor = page.devices.get(number, (0, 0))
            entry = TreeEntry(
                path,
                page.modes[number],
                page.sizes_bytes[number],
                listed.times[number],
                page.links.get(number, ""),
                digests[number] or None,
                page.xattrs.get(number, {}),
                major,
                minor,
            )
            found.append(entry)
    return found


paths = st.text(
    alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)
times = st.integers(min_value=-(1 << 63), max_value=(1 << 63) - 1)
xattrs = st.dictionaries(st.sampled_from(["user.a", "user.b"]), st.binary(max_size=9), max_size=2)
files = st.builds(
    TreeEntry,
    paths,
    st.sampled_from([0o644, 0o755]),
    st.integers(min_value=1, max_value=1 << 50),
    times,
    st.just(""),
    st.binary(min_size=32, max_size=32),
    xattrs,
)
links = st.builds(
    TreeEntry, paths, st.sampled_from([0o644, MODE_SYMLINK]), st.just(0), times, paths
)
directories = st.builds(
    TreeEntry, paths, st.just(MODE_DIR | 0o755), st.just(0), times, xattrs=xattrs
)
devices = st.builds(
    TreeEntry,
    paths,
    st.sampled_from([MODE_DEVICE, MODE_DEVICE | MODE_CHAR_DEVICE]),
    st.just(0),
    times,
    device_major=st.integers(0, 1 << 20),
    device_minor=st.integers(0, 1 << 20),
)


@given(st.lists(st.one_of(files, links, directories, devices), max_size=60))
def test_pages_hold_what_was_added(entries: list[TreeEntry]) -> None:
    listing = _listing(list(entries))
    assert _entries(listing) == entries
    assert listing.entries == len(entries)
    assert listing.files == sum(is_regular(entry.mode) for entry in entries)
    assert listing.total_bytes == sum(entry.size_bytes for entry in entries)
    for number, entry in enumerate(entries):
        if entry.sha256 is None:
            with pytest.raises(UsageError, match="no content"):
                listing.content(number)
        else:
            assert listing.content(number) == ListedContent(
                entry.path, entry.size_bytes, entry.sha256, entry.modified_at_ns
            )


def test_empty_file_has_no_content() -> None:
    with pytest.raises(UsageError):
        _listing([_file("empty", size=0)]).content(0)


@pytest.mark.parametrize("number", [-1, 3, 1 << 70])
def test_unknown_entry_is_an_index_error(number: int) -> None:
    listing = _listing([_file("a"), _file("b"), _file("c")])
    listing.content(2)
    with pytest.raises(IndexError):
        listing.content(number)


def test_listing_without_entries_has_no_pages() -> None:
    listing = _listing([])
    assert listing.pages == []
    assert listing.entries == 0


runs = st.lists(
    st.tuples(
        st.sampled_from(["", "d/", "é/"]),
        st.lists(st.tuples(st.integers(0, 2), times), min_size=1, max_size=150),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(runs)
def test_a_run_is_listed_as_its_entries_would_be(
    parts: list[tuple[str, list[tuple[int, int]]]],
) -> None:
    items: list[ContextItem] = []
    for number, (prefix, rows) in enumerate(parts):
        names = [f"{number}-{position}" for position in range(len(rows))]
        items += [
            TreeEntry(f"{prefix}before-{number}", MODE_DIR, 0, 0),
            FileRun(
                prefix,
                names,
                [0o644] * len(rows),
                array("Q", [size for size, _ in rows]),
                array("q", [time for _, time in rows]),
                b"".join(_digest(name) for name in names),
            ),
        ]
    together, single = _listing(items), _listing(list(tree_entries(items)))
    assert together.pages == single.pages
    assert (together.files, together.total_bytes) == (single.files, single.total_bytes)


PATHS = sorted(f"d{number % 40:02d}/file-{number}" for number in range(5000))


def test_pages_have_bounds() -> None:
    listing = _listing([_file(path) for path in PATHS])
    sizes = [len(page.times) for page in listing.pages]
    assert sum(sizes) == len(PATHS)
    assert all(MIN_PAGE_ENTRIES <= size <= MAX_PAGE_ENTRIES for size in sizes[:-1])
    assert 15 < len(sizes) < 60


@given(st.integers(0, 4999), st.text(alphabet="abz/", min_size=1, max_size=5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_new_or_missing_file_changes_few_pages(number: int, name: str, remove: bool) -> None:
    before = _listing([_file(path) for path in PATHS])
    changed = list(PATHS)
    if remove:
        del changed[number]
    else:
        changed.insert(number, f"{PATHS[number]}{name}")
    after = _listing([_file(path) for path in changed])
    known = {page.digest for page in before.pages}
    # Two as a rule; more where a moved cut takes some pages to meet the former cuts again.
    assert len([page for page in after.pages if page.digest not in known]) <= 6


def test_times_are_not_part_of_a_pages_name() -> None:
    one, other = _listing([_file("a", mtime=1)]), _listing([_file("a", mtime=2)])
    assert one.pages[0].digest == other.pages[0].digest
    assert one.pages[0].times != other.pages[0].times


def test_attributes_that_no_page_can_hold_are_an_error() -> None:
    listing = ClientListing()
    large = {"user.x": bytes(64_000)}
    names = [name for name in map("f{}".format, range(200)) if not begins_page(name, 100)]
    for name in names[:140]:
        listing.add(TreeEntry(name, 0o644, 1, 0, "", bytes(32), large))
    with pytest.raises(ContextError, match=r'attributes of "f0".*too large'):
        listing.finish()


def test_content_is_found_while_the_listing_grows() -> None:
    listing = ClientListing()
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                count = listing.entries
                for number in range(0, count, 97):
                    assert listing.content(number).path == PATHS[number]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for path in PATHS:
        listing.add(_file(path))
    listing.finish()
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [listing.content(number).path for number in range(len(PATHS))] == PATHS


def test_scanned_tree_is_listed_completely(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a", "b", "d/x", "empty", "z"):
        (tmp_path / name).write_bytes(name.encode() if name != "empty" else b"")
    (tmp_path / "c").hardlink_to(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "note").write_bytes(b"n")
    os.setxattr(tmp_path / "note", "user.note", b"1")
    listing = _listing(list(scan_context(tmp_path, warn=print)))
    found = {entry.path: entry for entry in _entries(listing)}
    assert list(found) == ["a", "b", "c", "d", "d/x", "empty", "link", "note", "z"]
    assert found["c"].link_name == "a"
    assert found["link"].link_name == "a"
    assert found["note"].xattrs == {"user.note": b"1"}
    assert found["d/x"].sha256 == _digest("d/x")
    assert found["empty"].sha256 is None
    numbers = {path: number for number, path in enumerate(found)}
    content = listing.content(numbers["z"])
    assert content.modified_at_ns == (tmp_path / "z").stat().st_mtime_ns

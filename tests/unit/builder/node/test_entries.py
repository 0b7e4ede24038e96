"""What is refused as a listing, with one sentence each."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.node.entries import (
    MAX_TIME_NS,
    ListingEnd,
    check_joint,
    check_path,
    check_times,
    read_page,
    unpack_page,
)
from offload_builder.node.listingfeed import ArrivedPage
from offload_core.errors import UsageError
from offload_core.filemode import (
    MODE_CHAR_DEVICE,
    MODE_DEVICE,
    MODE_DIR,
    MODE_NAMED_PIPE,
    MODE_SETUID,
    MODE_SOCKET,
    MODE_SYMLINK,
)
from offload_core.listing import Page, encode_page
from tests.fixtures.listings import (
    Tree,
    deep,
    file,
    folder,
    hardlink,
    ordered,
    page_of,
    symlink,
    with_parents,
)

START = ListingEnd()


def listed(tree: Tree, paths=None, after: ListingEnd = START) -> ListingEnd:
    page = page_of(tree, ordered(tree) if paths is None else paths)
    return read_page(encode_page(page), after)[1]


def one(mode: int = 0o644, size: int = 0, path: str = "p", **fields) -> Page:
    return Page([path], [mode], [size], fields.pop("digests", b""), **fields)


@pytest.mark.parametrize("path", ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "./a", "a/./b",
                                  "a/../b", "../a", "a\0b", "x" * 5000])  # fmt: skip
def test_bad_paths_are_refused(path):
    with pytest.raises(UsageError, match="bad path"):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b", ".a", "..a", "a..", "...", "a/...b", "a b/ü", "a\\b"])
def test_odd_but_clean_paths_are_taken(path):
    check_path(path)


def test_a_tree_of_every_kind_is_taken():
    tree = with_parents(
        {
            "a": file(b"1"), "a b/c": file(b"2", mode=0o755 | MODE_SETUID), "a.b": file(b""),
            "a/x/y/z": file(b"3", xattrs={"user.a": b"1", "security.capability": b"2"}),
            "h": hardlink("a"), "l": symlink("../../etc/passwd"), "ü": folder(),
            "p": file(b"", mode=MODE_NAMED_PIPE | 0o600), "s": file(b"", mode=MODE_SOCKET | 0o600),
        }
    )  # fmt: skip
    tree["a"] = folder()
    tree["h"] = hardlink("a b/c")
    assert listed(tree) == ("ü", True)
    # Cut anywhere it is the same.
    paths = ordered(tree)
    for size in (1, 2, 3):
        end = START
        for batch in itertools.batched(paths, size) if hasattr(itertools, "batched") else (
            paths[at : at + size] for at in range(0, len(paths), size)
        ):  # fmt: skip
            check_joint(batch[0], end)
            end = listed(tree, batch, end)
        assert end == ("ü", True)


ORDERS = {
    "unsorted": ["b", "a"],
    "twice": ["a", "a"],
    "content away from its directory": ["d", "e", "d/x"],
    "names as text": ["d", "d.x", "d/x"],
}


@pytest.mark.parametrize("paths", ORDERS.values(), ids=ORDERS)
def test_entries_out_of_order_are_refused(paths):
    tree = {**{path: file(b"1") for path in paths}, "d": folder()}
    with pytest.raises(UsageError, match=f"listed '{paths[-1]}'.*out of order"):
        listed(tree, paths)
    end = listed(tree, paths[:-1])
    for check in (check_joint, lambda path, after: listed(tree, [path], after)):
        with pytest.raises(UsageError, match=f"listed '{paths[-1]}'.*out of order"):
            check(paths[-1], end)


HIDDEN = {
    "no parent": {"d/x": file(b"1")},
    "no grandparent's child": {"d": folder(), "d/e/x": file(b"1")},
    "behind a file": {"d": file(b"1"), "d/x": file(b"1")},
    "behind a symbolic link": {"d": symlink("/etc"), "d/passwd": file(b"1")},
    "behind a hard link": {"a": file(b"1"), "d": hardlink("a"), "d/x": file(b"1")},
    "behind another directory": {"d": folder(), "dx/y": file(b"1")},
}


@pytest.mark.parametrize("tree", HIDDEN.values(), ids=HIDDEN)
def test_entries_outside_of_listed_directories_are_refused(tree):
    *before, last = ordered(tree)
    with pytest.raises(UsageError, match=f"listed '{last}'.*not in a directory"):
        listed(tree)
    end = listed(tree, before) if before else START
    for check in (check_joint, lambda path, after: listed(tree, [path], after)):
        with pytest.raises(UsageError, match=f"listed '{last}'.*not in a directory"):
            check(last, end)


MALFORMED = {
    "two types": one(MODE_DIR | MODE_SYMLINK | 0o755),
    "unknown bit": one(1 << 19 | 0o644),
    "no target": one(MODE_SYMLINK | 0o777),
    "empty target": one(MODE_SYMLINK | 0o777, links={0: ""}),
    "empty hard link": one(links={0: ""}),
    "target with NUL": one(MODE_SYMLINK | 0o777, links={0: "a\0b"}),
    "long target": one(MODE_SYMLINK | 0o777, links={0: "x" * 5000}),
    "directory with a target": one(MODE_DIR | 0o755, links={0: "a"}),
    "pipe with a target": one(MODE_NAMED_PIPE | 0o644, links={0: "a"}),
    "file with numbers": one(devices={0: (1, 3)}),
    "other attribute": one(xattrs={0: {"trusted.overlay.redirect": b"/"}}),
}


@pytest.mark.parametrize("page", MALFORMED.values(), ids=MALFORMED)
def test_malformed_entries_are_refused(page):
    with pytest.raises(UsageError, match="malformed"):
        read_page(encode_page(page), START)


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "a/../../x"])
def test_a_hard_link_out_of_the_tree_is_refused(target):
    with pytest.raises(UsageError, match="bad path"):
        read_page(encode_page(one(links={0: target})), START)


@pytest.mark.parametrize("kind", [MODE_DEVICE, MODE_DEVICE | MODE_CHAR_DEVICE])
def test_a_device_is_refused_with_a_hint(kind):
    with pytest.raises(UsageError, match=r"device 'p'.*\.dockerignore"):
        read_page(encode_page(one(kind | 0o666, devices={0: (1, 3)})), START)


@pytest.mark.parametrize(
    "page", [one(size=5), one(digests=bytes(32)), one(size=2**63, digests=bytes(32)),
             one(size=5, digests=bytes(31))],
    ids=["no digest", "digest for nothing", "too large", "short digest"],
)  # fmt: skip
def test_digests_and_sizes_must_fit(page):
    with pytest.raises(UsageError, match="damaged"):
        read_page(encode_page(page), START)


def test_a_page_is_the_one_that_was_announced():
    data = encode_page(page_of(tree := deep(["a", "b/c"]), ordered(tree)))
    digest = hashlib.sha256(data).digest()
    packed = zstandard.compress(data)
    assert unpack_page(ArrivedPage(data, False, []), digest) == data
    assert unpack_page(ArrivedPage(packed, True, []), digest) == data
    with pytest.raises(UsageError, match="another page"):
        unpack_page(ArrivedPage(data + b"x", False, []), digest)
    with pytest.raises(UsageError, match="another page"):
        unpack_page(ArrivedPage(packed, True, []), bytes(32))
    with pytest.raises(UsageError, match="damaged"):
        unpack_page(ArrivedPage(packed[:-3], True, []), digest)


def test_times_are_counted_and_kept_within_what_disks_know():
    assert check_times([1, -2, 3], 3) == [1, -2, 3]
    assert check_times([2**80, -(2**80)], 2) == [MAX_TIME_NS, -MAX_TIME_NS]
    with pytest.raises(UsageError, match="without all of its times"):
        check_times([1], 2)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_page_or_refused(data):
    try:
        page, end = read_page(data, START)
    except UsageError:
        return
    assert end.path == page.paths[-1]

"""What a node accepts as a listing of a build context.

A page is the page that its digest names, its columns fit together, its paths are clean and in
BuildKit's order, and each entry lies in a directory that was listed before it. So nothing is
listed twice, outside of the tree, or behind a symbolic link. BuildKit checks much of this, too;
here each fault has one sentence, whatever reads the listing.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from offload_builder.node.listingfeed import unpacked_size
from offload_core.errors import UsageError
from offload_core.filemode import (
    MODE_CHAR_DEVICE,
    MODE_DEVICE,
    MODE_DIR,
    MODE_NAMED_PIPE,
    MODE_SETGID,
    MODE_SETUID,
    MODE_SOCKET,
    MODE_STICKY,
    MODE_SYMLINK,
    MODE_TYPE,
)
from offload_core.listing import Page, decode_page

if TYPE_CHECKING:
    from offload_builder.node.listingfeed import ArrivedPage

MAX_PATH_CHARACTERS = 4096
"""Linux's PATH_MAX."""
MAX_SIZE_BYTES = 2**63 - 1
MAX_TIME_NS = 2**62
"""The year 2116; later and very early times, which no disk keeps exactly, are told as this."""
_BAD_PATH = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|\0")
_PERMISSIONS = 0o777 | MODE_SETUID | MODE_SETGID | MODE_STICKY
_TYPES = frozenset({0, MODE_DIR, MODE_SYMLINK, MODE_NAMED_PIPE, MODE_SOCKET})


class ListingEnd(NamedTuple):
    """The last entry of a part of a listing; what may follow depends on it."""

    path: str = ""
    directory: bool = True


def check_path(path: str) -> None:
    """Refuse a path that is not relative, clean and below its root.

    Raises:
        UsageError: with the path.
    """
    if _BAD_PATH.search(path) or len(path) > MAX_PATH_CHARACTERS:
        raise UsageError(f"the client sent a build context with the bad path {path[:200]!r}")


def tree_key(path: str) -> str:
    """Return what sorts as BuildKit lists: a directory is followed by its content."""
    return path.replace("/", "\0")


def unpack_page(arrived: ArrivedPage, digest: bytes) -> bytes:
    """Return the bytes of a page; takes milliseconds for a large one.

    Raises:
        UsageError: it is not the page that was announced.
    """
    data = arrived.data
    if arrived.zstd:
        size = unpacked_size(data, zstd=True)
        try:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        except zstandard.ZstdError as error:
            raise UsageError("the client sent a damaged listing of the build context") from error
    if hashlib.sha256(data).digest() != digest:
        raise UsageError("the client sent another page of the build context than it had announced")
    return data


def read_page(data: bytes, after: ListingEnd) -> tuple[Page, ListingEnd]:
    """Return the entries of a page, and its end.

    Args:
        data: serialised; its digest was verified.
        after: end of the page before.

    Raises:
        UsageError: with the path that no honest client sends.
    """
    page = decode_page(data)
    last, directory = after
    before = tree_key(last)
    for number, (path, mode) in enumerate(zip(page.paths, page.modes, strict=True)):
        check_path(path)
        key = tree_key(path)
        if key <= before:
            raise _out_of_order(path)
        parent = path.rpartition("/")[0]
        if parent and not _may_contain(parent, last, directory=directory):
            raise _no_parent(path)
        last, directory, before = path, bool(mode & MODE_DIR), key
        if mode & ~_PERMISSIONS or number in page.links:
            _check_special(page, number)
    for number in (*page.xattrs, *page.devices):
        _check_special(page, number)
    if max(page.sizes_bytes) > MAX_SIZE_BYTES:
        raise UsageError("the client sent a damaged listing of the build context")
    return page, ListingEnd(last, directory)


def check_joint(first: str, after: ListingEnd) -> None:
    """Refuse a page that was checked by itself but does not fit behind the one before.

    Args:
        first: path of its first entry.
        after: end of the page before.

    Raises:
        UsageError: with the path.
    """
    if tree_key(first) <= tree_key(after.path):
        raise _out_of_order(first)
    parent = first.rpartition("/")[0]
    if parent and not _may_contain(parent, after.path, directory=after.directory):
        raise _no_parent(first)


def check_times(times_ns: list[int], entries: int) -> list[int]:
    """Return the times of a page, within what BuildKit can be told.

    Raises:
        UsageError: not one for each entry.
    """
    if len(times_ns) != entries:
        raise UsageError("the client sent a page of the build context without all of its times")
    if times_ns and (max(times_ns) > MAX_TIME_NS or min(times_ns) < -MAX_TIME_NS):
        return [max(-MAX_TIME_NS, min(MAX_TIME_NS, time)) for time in times_ns]
    return times_ns


def _may_contain(parent: str, last: str, *, directory: bool) -> bool:
    # In this order what comes next lies in the last entry or in a directory around it, and these
    # were checked to be directories when the last entry was.
    if parent == last:
        return directory
    return last.startswith(parent) and last[len(parent)] == "/"


def _check_special(page: Page, number: int) -> None:
    path, mode, link = page.paths[number], page.modes[number], page.links.get(number)
    kind = mode & MODE_TYPE
    if kind & (MODE_DEVICE | MODE_CHAR_DEVICE):
        raise UsageError(
            f"the build context has the device {path[:200]!r}, which cannot be sent; "
            "exclude it in .dockerignore"
        )
    if kind == MODE_SYMLINK:
        fits = bool(link)
    elif kind == 0:
        fits = link != ""
    else:
        fits = kind in _TYPES and link is None
    if (
        not fits
        or mode & ~(_PERMISSIONS | MODE_TYPE)
        or number in page.devices
        or not all(map(_is_offered, page.xattrs.get(number, ())))
    ):
        raise UsageError(f"the client sent a malformed entry for {path[:200]!r}")
    if link is not None:
        if kind == 0:
            check_path(link)
        elif "\0" in link or len(link) > MAX_PATH_CHARACTERS:
            raise UsageError(f"the client sent a malformed link for {path[:200]!r}")


def _is_offered(attribute: str) -> bool:
    """Return whether an extended attribute is one that belongs to content.

    Others steer the security modules and the layers of the machine that they are set on.
    """
    return attribute == "security.capability" or attribute.startswith("user.")


def _out_of_order(path: str) -> UsageError:
    return UsageError(f"the client listed {path[:200]!r} of the build context out of order")


def _no_parent(path: str) -> UsageError:
    return UsageError(
        f"the client listed {path[:200]!r} of the build context, which is not in a directory "
        "listed before it"
    )

"""Entries of a listing as BuildKit's STAT packets, each ready to be sent on a DiffCopy call.

Source: fsutil's types/wire.proto, types/stat.proto and stat_unix.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from offload_builder.buildkit.h2.messages import message_prefix, varint
from offload_core.filemode import MODE_SOCKET, MODE_SYMLINK, is_regular
from offload_proto.buildkit.fsutil_pb2 import Packet, Stat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_core.listing import Page

NO_CONTENT = -1
_PREFIX_BYTES = 5
_STAT_TAG = b"\x12"
"""Packet.stat, field 2; the type of a STAT packet is 0 and not written."""


class ToldEntry(NamedTuple):
    """An entry as BuildKit was told of it."""

    path: str
    mode: int
    size_bytes: int
    modified_at_ns: int
    link: str

    @property
    def content_size(self) -> int:
        """Bytes that BuildKit may ask for; `NO_CONTENT` where it may not ask."""
        return self.size_bytes if is_regular(self.mode) and not self.link else NO_CONTENT


def stat_frames(page: Page, times_ns: Sequence[int]) -> bytes:
    """Return the entries of a page as gRPC messages, one after the other.

    Owner and group are always root, as in docker build. A socket is told as an empty file, because
    BuildKit cannot make one.
    """
    frames: list[bytes] = []
    links, xattrs, devices = page.links, page.xattrs, page.devices
    stat = Stat()
    clear, serialize = stat.Clear, stat.SerializeToString
    rows = zip(page.paths, page.modes, page.sizes_bytes, times_ns, strict=True)
    for number, (path, mode, size, time_ns) in enumerate(rows):
        clear()
        stat.path = path
        stat.mode = mode & ~MODE_SOCKET
        stat.modTime = time_ns
        if number in links:
            stat.linkname = links[number]
            if mode & MODE_SYMLINK:
                # What lstat says of a link; with another size the daemon would make it anew.
                stat.size = len(links[number].encode())
            elif is_regular(mode):
                stat.size = size
        elif size and is_regular(mode):
            stat.size = size
        if number in xattrs:
            for name, value in xattrs[number].items():
                stat.xattrs[name] = value
        if number in devices:
            stat.devmajor, stat.devminor = devices[number]
        data = serialize()
        length = len(data)
        if length < 0x7E:
            frames.append(b"\0\0\0\0%c\x12%c%b" % (length + 2, length, data))
        else:
            head = _STAT_TAG + varint(length)
            frames.append(b"%b%b%b" % (message_prefix(len(head) + length), head, data))
    return b"".join(frames)


def read_frames(frames: bytes) -> list[ToldEntry]:
    """Return the entries that `stat_frames` has written."""
    entries: list[ToldEntry] = []
    position, end = 0, len(frames)
    while position < end:
        start = position + _PREFIX_BYTES
        position = start + int.from_bytes(frames[position + 1 : start])
        stat = Packet.FromString(frames[start:position]).stat
        entries.append(ToldEntry(stat.path, stat.mode, stat.size, stat.modTime, stat.linkname))
    return entries

"""The tree of files that a tar archive describes, as unpacking it would make it.

The last entry of a name wins, except that a directory keeps what is in it; directories that are
missing are made; links in the path of an entry are followed within the archive. Nothing is
unpacked: a file is known by where its bytes are in the archive.
Source: pax(1p) "ustar Interchange Format", and what BuildKit does with an archive (moby's
go-archive, Unpack), which is followed but for what it silently cuts off.
"""

from __future__ import annotations

import stat
import tarfile
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, BinaryIO, cast

from offload_client.context.entries import NO_XATTRS
from offload_core.errors import ContextError
from offload_core.goglob import clean_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BLOCK_BYTES = 512
MADE_DIRECTORY_MODE = 0o755
"""Of directories that have no entry of their own."""
_MAX_LINKS = 255
_XATTR = "SCHILY.xattr."
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class TarNode:
    """A file, directory, link or device; a file with hard links is one node.

    Attributes:
        mode: as in stat(2).
        modified_at_ns: nanoseconds since 1970 UTC.
        size_bytes: of a regular file.
        data: where the bytes of a regular file begin in the archive; for a sparse file, the
            position in the file, length and position in the archive of each of its parts.
        link: target of a symbolic link.
        device: major and minor number.
        xattrs: extended attributes that belong to the content.
        names: how many names it has.
        children: of a directory, by name.
        sha256: digest of a regular file, once it is known.
    """

    __slots__ = (
        "children",
        "data",
        "device",
        "link",
        "mode",
        "modified_at_ns",
        "names",
        "sha256",
        "size_bytes",
        "xattrs",
    )

    def __init__(self, mode: int, modified_at_ns: int) -> None:
        self.mode = mode
        self.modified_at_ns = modified_at_ns
        self.size_bytes = 0
        self.data: int | Sequence[tuple[int, int, int]] = 0
        self.link = ""
        self.device = (0, 0)
        self.xattrs: Mapping[str, bytes] = NO_XATTRS
        self.names = 1
        self.children: dict[str, TarNode] | None = {} if stat.S_ISDIR(mode) else None
        self.sha256: bytes | None = None


def read_tree(file: BinaryIO) -> TarNode:
    """Return the root of the tree in an uncompressed archive; nothing of `file` is kept.

    Raises:
        ContextError: the archive is damaged or cut off, or has an entry that cannot be part of a
            build context; names it.
        OSError: the file cannot be read.
    """
    tree = _Tree()
    for member in _members(file):
        tree.add(member)
    return tree.root


def find(root: TarNode, path: str) -> TarNode | None:
    """Return the node of a clean path, no links followed; None when there is none."""
    node: TarNode | None = root
    for name in path.split("/") if path else ():
        node = node.children.get(name) if node is not None and node.children is not None else None
    return node


def resolve(root: TarNode, path: str) -> TarNode | None:
    """Return the node of a clean path with all links followed, the last one included.

    A link out of the archive leads nowhere.
    """
    try:
        folder, name = _Tree(root).place(path, follow_last=True, make=None)
    except ContextError:
        return None
    return folder.get(name)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                yield member
                # It keeps them all, which nobody asked for.
                archive.members.clear()  # type: ignore[attr-defined]
            _check_end(file, archive.offset)
    except tarfile.TarError as error:
        raise _damaged(str(error)) from error
    except (ValueError, OverflowError) as error:
        # Numbers in extended headers.
        raise _damaged(str(error)) from error


def _check_end(file: BinaryIO, offset: int) -> None:
    """Tell the end of the archive from a header that tarfile could not read and took for it."""
    file.seek(offset)
    block = file.read(BLOCK_BYTES)
    if block and (len(block) < BLOCK_BYTES or any(block)):
        raise _damaged("an entry has no valid header")


def _damaged(why: str) -> ContextError:
    return ContextError(f"the tar archive of the build context is damaged or cut off: {why}")


def _refused(name: str, why: str) -> ContextError:
    shown = name.encode("utf-8", "backslashreplace").decode()
    return ContextError(f'the entry "{shown}" of the tar archive {why}')


class _Tree:
    def __init__(self, root: TarNode | None = None) -> None:
        self.root = root or TarNode(stat.S_IFDIR | MADE_DIRECTORY_MODE, 0)
        self._top = self.root.children or {}
        self.root.children = self._top

    def add(self, member: tarfile.TarInfo) -> None:
        path = _clean(member.name, member.name)
        if path == ".":
            return
        when = _modified_at_ns(member)
        folder, name = self.place(path, follow_last=False, make=when)
        before = folder.get(name)
        if member.islnk():
            node = self._link_target(member)
            if node is before:
                return
            node.names += 1
        else:
            node = _node(member, when)
            if before is not None and before.children is not None and node.children is not None:
                node.children = before.children
        if before is not None:
            before.names -= 1
        folder[name] = node

    def _link_target(self, member: tarfile.TarInfo) -> TarNode:
        target = _clean(member.linkname, member.name)
        folder, name = self.place(target, follow_last=False, make=None)
        node = folder.get(name)
        if node is None:
            raise _refused(member.name, f'is a hard link to "{target}", which is not before it')
        if node.children is not None:
            raise _refused(member.name, f'is a hard link to "{target}", which is a directory')
        return node

    def place(
        self, path: str, *, follow_last: bool, make: int | None
    ) -> tuple[dict[str, TarNode], str]:
        """Return the content of the directory that holds a path, and the last name.

        Args:
            path: clean.
            follow_last: the last name may be a link that is followed.
            make: modification time of directories that are made when missing; None makes none.

        Raises:
            ContextError: the path goes through a file, out of the archive, or in a circle, or
                ends at the root.
        """
        way = [self._top]
        left = _elements(path)
        links = 0
        while left:
            name = left.pop()
            if name == "..":
                if len(way) == 1:
                    raise _refused(path, "leaves the build context through a symbolic link")
                way.pop()
                continue
            node = way[-1].get(name)
            if node is not None and node.link and (left or follow_last):
                links += 1
                if links > _MAX_LINKS:
                    raise _refused(path, "goes through symbolic links in a circle")
                if node.link.startswith("/"):
                    del way[1:]
                left += _elements(node.link)
                continue
            if not left:
                return way[-1], name
            if node is None:
                node = TarNode(stat.S_IFDIR | MADE_DIRECTORY_MODE, make or 0)
                if make is not None:
                    way[-1][name] = node
            if node.children is None:
                raise _refused(path, f'is below "{name}", which is not a directory')
            way.append(node.children)
        raise _refused(path, "takes the place of the build context itself")


def _elements(path: str) -> list[str]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _clean(name: str, entry: str) -> str:
    path = clean_path(name.lstrip("/"))
    if path == ".." or path.startswith("../"):
        raise _refused(entry, 'leads out of the build context with ".."')
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise _refused(entry, "has a name that is not UTF-8") from error
    return path


def _node(member: tarfile.TarInfo, modified_at_ns: int) -> TarNode:
    regular = member.isreg()
    kind = stat.S_IFREG if regular else _KINDS.get(member.type)
    if kind is None:
        raise _refused(
            member.name,
            f"is of type {member.type.decode('latin-1')!r}, which has no place in a build context",
        )
    permissions = 0o777 if kind == stat.S_IFLNK else member.mode & 0o7777
    node = TarNode(kind | permissions, modified_at_ns)
    if regular:
        node.size_bytes = member.size
        node.data = member.offset_data if member.sparse is None else _parts(member)
    elif kind == stat.S_IFLNK:
        if not member.linkname:
            raise _refused(member.name, "is a symbolic link without a target")
        _clean_target(member)
        node.link = member.linkname
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.device = (member.devmajor, member.devminor)
    node.xattrs = _xattrs(member)
    return node


def _clean_target(member: tarfile.TarInfo) -> None:
    try:
        member.linkname.encode()
    except UnicodeEncodeError as error:
        raise _refused(member.name, "is a link to a name that is not UTF-8") from error


def _parts(member: tarfile.TarInfo) -> tuple[tuple[int, int, int], ...]:
    parts: list[tuple[int, int, int]] = []
    position = member.offset_data
    end = 0
    sparse = cast("Sequence[tuple[int, int]]", member.sparse)
    for offset, length in sparse:
        if not length:
            # Says where the file ends, or fills the header up.
            continue
        if offset < end or length < 0 or offset + length > member.size:
            raise _refused(member.name, "has a damaged list of its parts")
        parts.append((offset, length, position))
        position += length
        end = offset + length
    return tuple(parts)


def _modified_at_ns(member: tarfile.TarInfo) -> int:
    text = member.pax_headers.get("mtime")
    if text is not None:
        # tarfile's own number has lost the nanoseconds.
        try:
            value = Decimal(text)
            if value.is_finite() and abs(value) < 1 << 33:
                return int(value.scaleb(9).to_integral_value(rounding="ROUND_FLOOR"))
        except InvalidOperation:
            pass
    return int(member.mtime) * 1_000_000_000


def _xattrs(member: tarfile.TarInfo) -> Mapping[str, bytes]:
    """Return the attributes that a scan of a directory would take."""
    return {
        name: value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if (name := key.removeprefix(_XATTR)) != key
        and (name == "security.capability" or name.startswith("user."))
    } or NO_XATTRS

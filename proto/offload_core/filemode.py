"""Go's os.FileMode bits, the encoding of modes in BuildKit's fsutil messages.

Source: Go's io/fs documentation (constants ModeDir ... ModeIrregular) and fsutil's Stat message.
"""

from __future__ import annotations

import stat

MODE_DIR = 1 << 31
MODE_SYMLINK = 1 << 27
MODE_DEVICE = 1 << 26
MODE_NAMED_PIPE = 1 << 25
MODE_SOCKET = 1 << 24
MODE_SETUID = 1 << 23
MODE_SETGID = 1 << 22
MODE_CHAR_DEVICE = 1 << 21
MODE_STICKY = 1 << 20
MODE_TYPE = MODE_DIR | MODE_SYMLINK | MODE_DEVICE | MODE_NAMED_PIPE | MODE_SOCKET | MODE_CHAR_DEVICE


def go_file_mode(st_mode: int) -> int:
    """Return the Go encoding of a POSIX `st_mode`."""
    mode = st_mode & 0o777
    if st_mode & stat.S_ISUID:
        mode |= MODE_SETUID
    if st_mode & stat.S_ISGID:
        mode |= MODE_SETGID
    if st_mode & stat.S_ISVTX:
        mode |= MODE_STICKY
    kind = stat.S_IFMT(st_mode)
    return mode | _KINDS.get(kind, 0)


_KINDS = {
    stat.S_IFDIR: MODE_DIR,
    stat.S_IFLNK: MODE_SYMLINK,
    stat.S_IFBLK: MODE_DEVICE,
    stat.S_IFCHR: MODE_DEVICE | MODE_CHAR_DEVICE,
    stat.S_IFIFO: MODE_NAMED_PIPE,
    stat.S_IFSOCK: MODE_SOCKET,
}


def is_regular(mode: int) -> bool:
    """Return whether a Go mode is that of a regular file (or of a hard link to one)."""
    return mode & MODE_TYPE == 0

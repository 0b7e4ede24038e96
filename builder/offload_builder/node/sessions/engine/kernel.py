"""Calls of the kernel that Python has no functions for.

The launcher waits for each import, so this one has few.
Sources: unshare(2), setns(2), mount(2), mount_setattr(2), pivot_root(2), prctl(2), loop(4), and the
kernel's include/uapi/linux/{sched,mount,loop}.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_CLONE_PARENT = 0x00008000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20

_MNT_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG = 1
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 4
_SYS_MOUNT_SETATTR = 442
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SIGCHLD = 17
_SIGKILL = 9

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_LOOP_GET_FREE = 0x4C82
_LO_AUTOCLEAR = 4
_LO_DIRECT_IO = 16
_LOOP_MAJOR = 7
_LOOP_TRIES = 50

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave namespaces for new ones.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc.unshare(flags), "unshare")


def enter(namespace: str | int, kind: int) -> None:
    """Move to a namespace, by its path or a descriptor.

    Raises:
        OSError: the kernel refuses.
    """
    if isinstance(namespace, int):
        _check(_libc.setns(namespace, kind), "setns")
        return
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, kind), f"setns {namespace}")
    finally:
        os.close(descriptor)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount.

    Raises:
        OSError: the kernel refuses.
    """
    texts = [os.fsencode(text) if text else None for text in (source, target, kind)]
    data = options.encode() if options else None
    _check(_libc.mount(*texts, ctypes.c_ulong(flags), data), f"mount {source} on {target}")


def bind_read_only(source: str, target: str) -> None:
    """Show a file or directory, with all that is mounted below, at another place to be read only.

    Raises:
        OSError: the kernel refuses.
    """
    mount(source, target, flags=MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attributes, 32
    )
    if result < 0 and ctypes.get_errno() == errno.ENOSYS:
        # Before Linux 5.12; what is mounted below keeps its flags, and no rights of ours.
        flags = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV
        mount("", target, flags=flags)
        return
    _check(result, f"mount_setattr {target}")


def unmount(target: str) -> None:
    """Take a mount with all below it away, at the latest when nobody uses it any more.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"umount {target}")


def change_root(folder: str) -> None:
    """Make a mounted directory the root of this mount namespace, and let go of the old one.

    Raises:
        OSError: the kernel refuses.
    """
    os.chdir(folder)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


def set_hostname(name: str) -> None:
    """Name the machine, as the processes of this namespace see it.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl")


def act_as(user: int) -> None:
    """Become a user and group for all that is made from now on, with the rights that we have.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0), "prctl")
    os.setegid(user)
    os.seteuid(user)


def fork_sibling() -> int:
    """Fork so that the new process is a child of our parent; as `os.fork` otherwise.

    Raises:
        OSError: the kernel refuses.
    """
    number = _SYS_CLONE[os.uname().machine]
    return _check(_libc.syscall(number, _CLONE_PARENT | _SIGCHLD, 0, 0, 0, 0), "clone")


def mount_disk(file: str, target: str, node: str) -> None:
    """Mount the ext4 file system in a file; what is deleted in it is given back to the disk.

    Its loop device goes with the last mount of it, and with this process if that comes first.

    Args:
        file: with the file system.
        target: where to.
        node: a path for the loop device's node, on a file system where devices work.

    Raises:
        OSError: the kernel refuses.
    """
    opened = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        device = _attach(opened, file, node)
    finally:
        os.close(opened)
    try:
        # Without the inode tables, which need not be written: they would fill the file.
        mount(node, target, "ext4", MS_NODEV, "discard,noinit_itable")
    finally:
        os.close(device)
        os.unlink(node)


def _attach(file: int, name: str, node: str) -> int:
    info = struct.pack(
        "5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, _LO_AUTOCLEAR | _LO_DIRECT_IO,
        os.fsencode(name)[-63:], b"", b"", 0, 0,
    )  # fmt: skip
    config = struct.pack("2I", file, 0) + info + bytes(64)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_TRIES):
            number = fcntl.ioctl(control, _LOOP_GET_FREE)
            # The machine's own /dev may be a container's, which new devices do not appear in.
            os.mknod(node, 0o60600, os.makedev(_LOOP_MAJOR, number))
            device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                os.unlink(node)
                if error.errno != errno.EBUSY:
                    raise
                # Somebody else was quicker.
                continue
            return device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free")


def detach_loop(device: str) -> None:
    """Let go of the file of a loop device; one that is mounted does so when it is no more.

    Raises:
        OSError: it has none.
    """
    opened = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(opened, _LOOP_CLR_FD)
    finally:
        os.close(opened)

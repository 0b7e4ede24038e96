"""Sockets that reach the machine past its network namespaces, which no process of an engine gets.

AF_VSOCK leads from any network namespace to the hypervisor and to whatever listens for it here, and
so from one engine to another; no firewall sees it. A filter of system calls refuses it, for
everything that is ever started in the engine. io_uring could make sockets past the filter, and
programs of 32 bits could by socketcall(2), which has had a system call for sockets beside it since
Linux 4.3: these are not there in an engine.

Part of the launcher, which has few imports.
Sources: seccomp(2); the kernel's include/uapi/linux/{seccomp,filter,bpf_common,audit}.h and tables
of system calls; fs/io_uring (IORING_OP_SOCKET).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_FAMILIES = (40, 42)
"""AF_VSOCK and AF_QIPCRTR."""
_IO_URING_SETUP = 425
_X32 = 0x4000_0000
_SOCKET = 1
"""Of socketcall(2)."""
# Architecture as the kernel names it in seccomp_data, its calls that make sockets, and its others.
_CALLS = {
    "x86_64": (
        (0xC000_003E, (41, 41 | _X32), (_IO_URING_SETUP, _IO_URING_SETUP | _X32), ()),
        (0x4000_0003, (359,), (_IO_URING_SETUP,), (102,)),
    ),
    "aarch64": (
        (0xC000_00B7, (198,), (_IO_URING_SETUP,), ()),
        (0x4000_0028, (281,), (_IO_URING_SETUP,), ()),
    ),
}
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16
"""Places in seccomp_data; of the first argument the lower half, all machines here begin with it."""
_LOAD, _IS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse_machine_sockets() -> None:
    """Have the kernel refuse them to this process and to all that it starts, whoever they become.

    Raises:
        OSError: the kernel has no such filters.
    """
    code = _filter(os.uname().machine)
    program = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"a filter of system calls: {os.strerror(number)}")


def _filter(machine: str) -> bytes:
    code = b""
    for architecture, sockets, missing, combined in _CALLS[machine]:
        for call in sockets:
            for family in _FAMILIES:
                code += _rule(architecture, call, errno.EAFNOSUPPORT, family)
        for call in combined:
            code += _rule(architecture, call, errno.ENOSYS, _SOCKET)
        for call in missing:
            code += _rule(architecture, call, errno.ENOSYS)
    return code + _step(_RETURN, _ALLOW)


def _rule(architecture: int, call: int, error: int, argument: int | None = None) -> bytes:
    """Return steps that refuse a call, and go on behind them for all others."""
    tests = [(_ARCHITECTURE, architecture), (_NUMBER, call)]
    if argument is not None:
        tests.append((_ARGUMENT, argument))
    code = b""
    for left, (place, value) in zip(reversed(range(len(tests))), tests, strict=True):
        code += _step(_LOAD, place) + _step(_IS, value, otherwise=2 * left + 1)
    return code + _step(_RETURN, _REFUSE | error)


def _step(what: int, value: int, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", what, 0, otherwise, value)

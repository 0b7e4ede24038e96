"""What a node's process gives up when it starts, for itself and for everything that it starts.

The agent makes namespaces and mounts, and BuildKit starts containers, so both stay root. What
neither needs goes from the process and its bounding set: no child gets it back, not even a step
with `security.insecure`. That is no border for such a step, but it loads no kernel module, sets no
clock and reads no memory of devices.

Two things stay as they are, for the sake of steps, which would inherit them: `no_new_privs`, with
which `sudo` in a Dockerfile fails, and the hard limit of core dumps.

Sources: capabilities(7), prctl(2), proc(5) oom_score_adj; BuildKit's executor/oci for the
capabilities of steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

log = structlog.get_logger(__name__)

OOM_SCORE = -500
"""Steps have `runcwrapper.STEP_OOM_SCORE`: where the machine has no memory left, they go first."""
KEPT = {
    # Of each step, as with docker.
    "chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4, "kill": 5, "setgid": 6, "setuid": 7,
    "setpcap": 8, "net_bind_service": 10, "net_raw": 13, "sys_chroot": 18, "mknod": 27,
    "audit_write": 29, "setfcap": 31,
    # Of the agent, BuildKit and runc: namespaces, mounts, networks, --ulimit, other users' files.
    "dac_read_search": 2, "net_admin": 12, "sys_ptrace": 19, "sys_admin": 21, "sys_resource": 24,
}  # fmt: skip
"""Capabilities that stay, with the kernel's numbers (include/uapi/linux/capability.h)."""

_VERSION_3 = 0x20080522
_PR_SET_DUMPABLE, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 23, 24
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Half(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


def give_up_privileges(data: Path) -> None:
    """Give up what a node does not need; before any thread is started, which would keep it.

    Args:
        data: directory of the node, which nobody else may look into from now on.

    Raises:
        ConfigError: the kernel does not let us, or the directory is another user's.
    """
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        data.chmod(0o700)
        if os.geteuid() == 0:
            _drop_capabilities(KEPT.values())
            # Secrets of builds are in our memory: no dump of it, and no other process reads it.
            _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    except OSError as error:
        raise ConfigError(
            f"the node cannot give up its privileges: {error.strerror} ({error.filename})"
        ) from error
    # It takes CAP_SYS_RESOURCE, which a container may not have. Steps have a higher one anyway.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def _drop_capabilities(kept: Iterable[int]) -> None:
    wanted = set(kept)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    dropped = [number for number in range(last + 1) if number not in wanted]
    # It needs CAP_SETPCAP, so it comes before the rest.
    for number in dropped:
        if _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
    header, halves = _Header(_VERSION_3, 0), (_Half * 2)()
    _call("capget", ctypes.byref(header), halves)
    for number in dropped:
        half, mask = halves[number // 32], ~(1 << number % 32) & 0xFFFFFFFF
        half.effective &= mask
        half.permitted &= mask
        half.inheritable &= mask
    _call("capset", ctypes.byref(header), halves)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)

"""Loop devices of the machine, by the files that they have. Its functions block."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from offload_builder.node.sessions.engine import kernel

_DEVICES = Path("/sys/block")
_POLL_SECONDS = 0.005
_UNLINKED = " (deleted)"


def devices_of(folder: Path) -> list[str]:
    """Return the loop devices that have a file below a directory."""
    prefix = f"{os.path.realpath(folder)}/"
    found = []
    for device in _DEVICES.glob("loop*"):
        with contextlib.suppress(OSError):
            file = (device / "loop" / "backing_file").read_text().rstrip("\n")
            if file.removesuffix(_UNLINKED).startswith(prefix):
                found.append(f"/dev/{device.name}")
    return found


def wait_until_detached(folder: Path, seconds: float) -> bool:
    """Wait until no loop device has a file below a directory; False when it takes longer.

    They go by themselves with their mounts, which go with the last process of an engine.
    """
    deadline = time.monotonic() + seconds
    while devices_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def detach_all(folder: Path) -> None:
    """Have all loop devices with a file below a directory let go of it."""
    for device in devices_of(folder):
        with contextlib.suppress(OSError):
            kernel.detach_loop(device)

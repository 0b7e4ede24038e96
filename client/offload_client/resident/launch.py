"""Starting a helper for the next command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.resident.thin import helper_enabled, socket_path

if TYPE_CHECKING:
    from offload_client.invocation import Invocation


def start_helper(invocation: Invocation) -> None:
    """Start a helper in the background unless one listens; failing to is no error."""
    environment = dict(invocation.environment)
    if invocation.resident or not helper_enabled(environment):
        return
    path = Path(socket_path(environment))
    if path.exists():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.parent.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            return
        # It must not keep the terminal, the directory or the standard streams of this command.
        subprocess.Popen(
            [sys.executable, "-m", "offload_client.resident.server", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,
            close_fds=True,
        )

"""Starting a helper for the next command."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.resident.thin import helper_enabled, socket_path

if TYPE_CHECKING:
    from offload_client.invocation import Invocation

KNOCK_SECONDS = 0.5
KEPT_VARIABLES = frozenset(
    (
        # Way to the keyring of the operating system.
        "DBUS_SESSION_BUS_ADDRESS",
        "HOME",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "PATH",
        "TMPDIR",
    )
)
KEPT_PREFIXES = ("GRPC_", "LC_", "OPENSSL_", "PYTHON", "SSL_")


def start_helper(invocation: Invocation) -> None:
    """Start a helper in the background unless one listens; failing to is no error."""
    environment = dict(invocation.environment)
    if invocation.resident or not helper_enabled(environment):
        return
    path = Path(socket_path(environment))
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.parent.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077 or _listens(path):
            return
        # It must not keep the terminal, the directory or the standard streams of this command,
        # nor secrets in its environment: every command brings its own.
        subprocess.Popen(
            [sys.executable, "-m", "offload_client.resident.server", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={
                name: value
                for name, value in environment.items()
                if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)
            },
            start_new_session=True,
            close_fds=True,
        )


def _listens(path: Path) -> bool:
    """Whether a helper lives behind the socket; one that was killed leaves its file."""
    if not path.exists():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.settimeout(KNOCK_SECONDS)
        try:
            knock.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            # It is there, but busy.
            return True
    return True

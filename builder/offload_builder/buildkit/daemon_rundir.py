"""Where a daemon's sockets lie."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from offload_core.errors import ConfigError


def run_directory(root: Path) -> Path:
    """Return the directory of a daemon's sockets.

    A socket's path is limited to 107 bytes and a root directory is not, so it lies elsewhere. It
    follows from the root, so that a restart finds what a crash left.
    """
    name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    if os.geteuid() == 0:
        return Path("/run/offload") / name
    return Path(tempfile.gettempdir()) / f"offload-{os.geteuid()}" / name


def make_private(folder: Path) -> None:
    """Make a directory that only we can enter; others could swap the socket in it.

    Raises:
        ConfigError: somebody else has made it.
    """
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{path} belongs to another user; remove it")

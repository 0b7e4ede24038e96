"""Which local paths may be mounted into containers of a session."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from offload_core.errors import InvalidValueError, NotFoundError

_SYSTEM = ("/proc", "/sys", "/dev", "/run", "/boot", "/var/run", "/var/lib/docker")
"""They describe this machine, and mean nothing on another one."""
_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Source(NamedTuple):
    """What is to be mounted.

    Attributes:
        root: directory, without links in its path.
        only: name of the one file that is meant; empty for the directory.
    """

    root: Path
    only: str = ""

    @property
    def path(self) -> Path:
        """What was meant."""
        return self.root / self.only if self.only else self.root


def check_source(text: str, *, home: Path, create: bool = False) -> Source:
    """Return what a path of a mount leads to.

    Args:
        text: absolute path of this machine.
        home: the member's home directory.
        create: make a directory where nothing is, as `docker run -v` does.

    Raises:
        InvalidValueError: it is not for a session.
        NotFoundError: nothing is there.
    """
    if not text.startswith("/"):
        raise InvalidValueError(f'"{text}" is no absolute path')
    path = os.path.realpath(text)
    home_path = os.path.realpath(home)
    if path == "/" or path == home_path or home_path.startswith(f"{path}/"):
        what = "your home directory" if path == home_path else f"{path}, which has everything,"
        raise InvalidValueError(
            f"{what} cannot be mounted into a session: all of it would be copied to the node",
            hint="mount the directory of the project",
        )
    if any(path == system or path.startswith(f"{system}/") for system in _SYSTEM):
        raise InvalidValueError(
            f"{text} describes this machine and cannot be mounted into a session",
            hint="containers of a session have those of the node's engine",
        )
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - `path` is a string
    except FileNotFoundError as error:
        if not create:
            raise NotFoundError(f"bind source path does not exist: {text}") from error
        Path(path).mkdir(parents=True, exist_ok=True)
        return Source(Path(path))
    except OSError as error:
        raise InvalidValueError(f"cannot read {text}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        return Source(Path(path))
    if stat.S_ISREG(mode):
        return Source(Path(path).parent, Path(path).name)
    kind = _KINDS.get(stat.S_IFMT(mode), "neither a file nor a directory")
    raise InvalidValueError(
        f"{text} is {kind}, and cannot be mounted into a session",
        hint="only files and directories can be copied to the node",
    )

"""One run of a command: where it stands, its environment and its three streams.

Nothing below this package reads `os.environ`, the current directory or `sys.stdout` of the
process, because the resident helper runs many commands, of several terminals, in one process.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Invocation:
    """What a command knows of its surroundings."""

    arguments: Sequence[str]
    cwd: Path
    environment: Mapping[str, str]
    stdin: int
    """File descriptor."""
    stdout: TextIO
    stderr: TextIO
    resident: bool = False
    """The command runs in the resident helper, not in a process of its own."""
    _home: Path | None = field(default=None, repr=False)

    @classmethod
    def of_process(cls, arguments: Sequence[str]) -> Invocation:
        """Return the invocation of this process."""
        return cls(arguments, Path.cwd(), dict(os.environ), 0, text_stream(1), text_stream(2))

    def path(self, text: str) -> Path:
        """Return a path of the command line, relative to where the command was started."""
        return self.cwd / Path(text).expanduser() if text.startswith("~") else self.cwd / text

    def home(self) -> Path:
        """Return the user's home directory."""
        return Path(self.environment.get("HOME") or "/")

    def config_dir(self) -> Path:
        """Return where our configuration is: OFFLOAD_CONFIG_DIR, else XDG's place."""
        if directory := self.environment.get("OFFLOAD_CONFIG_DIR"):
            return self.path(directory)
        base = self.environment.get("XDG_CONFIG_HOME")
        return (Path(base) if base else self.home() / ".config") / "offload"

    def cache_dir(self) -> Path:
        """Return where data lives that can be made again."""
        base = self.environment.get("XDG_CACHE_HOME")
        return (Path(base) if base else self.home() / ".cache") / "offload"

    def out(self, text: str) -> None:
        """Print a line of results."""
        print(text, file=self.stdout, flush=True)

    def err(self, text: str) -> None:
        """Print a line that is not a result."""
        print(text, file=self.stderr, flush=True)


def text_stream(file: int) -> TextIO:
    """Return a UTF-8 text stream over a descriptor, which stays open when the stream is closed."""
    raw = io.FileIO(file, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="replace", write_through=False
    )

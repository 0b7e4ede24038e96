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

from offload_client.interrupts import Interrupts
from offload_core.errors import ConfigError

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
    interrupts: Interrupts = field(default_factory=Interrupts, compare=False)

    @classmethod
    def of_process(cls, arguments: Sequence[str]) -> Invocation:
        """Return the invocation of this process."""
        try:
            cwd = Path.cwd()
        except FileNotFoundError:
            # Deleted under us; only what needs the directory fails, and says so.
            cwd = Path(os.environ.get("PWD") or "/")
        return cls(arguments, cwd, dict(os.environ), 0, text_stream(1), text_stream(2))

    def path(self, text: str) -> Path:
        """Return a path of the command line, relative to where the command was started.

        A leading "~/" is the home directory of the invocation, as it is where a shell does not
        see it, for example in `dest=~/out`.
        """
        if text == "~" or text.startswith("~/"):
            return self.home() / text[2:]
        return self.cwd / text

    def home(self) -> Path:
        """Return the user's home directory."""
        return Path(self.environment.get("HOME") or "/")

    def config_dir(self) -> Path:
        """Return where our configuration is: OFFLOAD_CONFIG_DIR, else XDG's place."""
        if directory := self.environment.get("OFFLOAD_CONFIG_DIR"):
            return self.path(directory)
        base = self.environment.get("XDG_CONFIG_HOME")
        return (Path(base) if base else self.home() / ".config") / "offload"

    def state_dir(self) -> Path:
        """Return where data lives that belongs to this machine: XDG's place."""
        base = self.environment.get("XDG_STATE_HOME")
        return (Path(base) if base else self.home() / ".local" / "state") / "offload"

    def cache_dir(self) -> Path:
        """Return where data lives that can be made again."""
        base = self.environment.get("XDG_CACHE_HOME")
        return (Path(base) if base else self.home() / ".cache") / "offload"

    def out_foreign(self, text: str) -> None:
        """Print text that comes from a build, and is for people.

        Raises:
            BrokenPipeError: as `out`.
            ConfigError: as `out`.
        """
        from offload_client.ci.guard import guard_foreign

        self.out(guard_foreign(self.environment, text))

    def out(self, text: str) -> None:
        """Print a line of results.

        Raises:
            BrokenPipeError: nobody reads them any more.
            ConfigError: they cannot be written, for example because the disk is full.
        """
        try:
            print(text, file=self.stdout, flush=True)
        except OSError as error:
            _give_up(self.stdout)
            if isinstance(error, BrokenPipeError):
                raise
            raise ConfigError(f"cannot write to standard output: {error.strerror}") from error

    def err(self, text: str) -> None:
        """Print a line that is not a result; one that nobody reads is no error."""
        from offload_client.ci.guard import guard_foreign

        try:
            print(guard_foreign(self.environment, text), file=self.stderr, flush=True)
        except OSError:
            _give_up(self.stderr)


def text_stream(file: int) -> TextIO:
    """Return a UTF-8 text stream over a descriptor, which stays open when the stream is closed."""
    try:
        raw = io.FileIO(file, "w", closefd=False)
    except OSError:
        # Closed by whoever started us.
        raw = io.FileIO(os.devnull, "w")
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="replace", write_through=False
    )


def _give_up(stream: TextIO) -> None:
    """Let what could not be written go nowhere, so that closing the stream does not fail again."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(null, stream.fileno(), inheritable=False)
    finally:
        os.close(null)
    stream.flush()

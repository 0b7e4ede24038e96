"""What a person at a terminal means by Ctrl-C: leave the build, end it, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
from typing import TYPE_CHECKING

from offload_client.ci.system import in_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.build.runrecord import RunRecord
    from offload_client.invocation import Invocation

_READ_BYTES = 64
_LOCAL_MODES = 3
"""Index into what termios.tcgetattr returns."""


class Question:
    """Asks once per Ctrl-C; a second one before the answer ends the build.

    Keys are read one by one and not shown while it is open, so that they do not disturb what the
    display paints. The terminal may be that of another process: the resident helper asks for the
    command that it serves.
    """

    def __init__(
        self,
        invocation: Invocation,
        record: RunRecord,
        say: Callable[[str], None],
        leave: Callable[[], None],
        *,
        forfeits: str,
    ) -> None:
        """Prepare.

        Args:
            invocation: with the terminal.
            record: of the build.
            say: shows a sentence.
            leave: called when the user wants to leave a build that goes on.
            forfeits: what does not come about when the user leaves; empty for nothing.
        """
        self._invocation = invocation
        self._record = record
        self._say = say
        self._leave = leave
        self._forfeits = forfeits
        self._modes: list[int | list[bytes | int]] | None = None

    def ask(self) -> bool:
        """Ask; False when the build is to end without a question."""
        if self._modes is not None:
            self.close()
            return False
        if self._record.result.done() or not self._open():
            return False
        if self._record.independent:
            lost = f" (without {self._forfeits})" if self._forfeits else ""
            self._say(
                f"Ctrl-C: press d to leave the build running{lost}, c or Ctrl-C to cancel it, "
                "any other key to go on"
            )
        else:
            needs = self._record.needs or "its start"
            self._say(
                f"Ctrl-C: you cannot leave yet, the build needs you for {needs}; press c or Ctrl-C "
                "to cancel it, any other key to go on"
            )
        return True

    def close(self) -> None:
        """Ask no more; leave the terminal as it was."""
        modes, self._modes = self._modes, None
        if modes is None:
            return
        file = self._invocation.stdin
        asyncio.get_running_loop().remove_reader(file)
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(file, termios.TCSANOW, modes)

    def _open(self) -> bool:
        if in_pipeline(self._invocation.environment):
            # Some systems give commands a terminal, but nobody sits there.
            return False
        file = self._invocation.stdin
        try:
            if not (os.isatty(file) and os.isatty(self._invocation.stderr.fileno())):
                return False
            if not self._invocation.resident and _in_background(file):
                return False
            modes = termios.tcgetattr(file)
            if not modes[_LOCAL_MODES] & termios.ICANON:
                # Another build asks there already, and brings back the modes that it has found.
                return False
            quiet = [*modes]
            quiet[_LOCAL_MODES] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(file, termios.TCSANOW, quiet)
            asyncio.get_running_loop().add_reader(file, self._read)
        except (termios.error, OSError):
            # No terminal to ask at.
            return False
        self._modes = modes
        return True

    def _read(self) -> None:
        try:
            key = os.read(self._invocation.stdin, _READ_BYTES)[:1].lower()
        except OSError:
            key = b""
        self.close()
        if key == b"c":
            self._invocation.interrupts.cancel()
        elif key == b"d" and self._record.independent:
            self._leave()
        elif key == b"d":
            needs = self._record.needs or "its start"
            self._say(f"the build needs you for {needs}; it goes on")
        else:
            self._say("the build goes on")


def _in_background(terminal: int) -> bool:
    """Return whether another job has the terminal; who touches it then is stopped by it."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:
        # Not the terminal that can stop this process.
        return False

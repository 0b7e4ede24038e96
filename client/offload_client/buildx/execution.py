"""Running a program beside us: its signals are ours, its exit code becomes ours."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.invocation import Invocation

PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2
)  # fmt: skip
OF_TERMINAL = frozenset((signal.SIGINT, signal.SIGQUIT))
KILLED_BASE = 128
"""What a shell adds to the number of the signal that has ended a program."""
END_SECONDS = 10.0


async def run_beside(
    invocation: Invocation, command: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Run a program with our streams to its end; return its exit code.

    Signals are passed on, except those that the terminal sends to it as well. A program that a
    signal has ended gives 128 and the signal's number, as in a shell.

    Raises:
        NotFoundError: there is no such program.
        UsageError: it cannot be run.
    """
    loop = asyncio.get_running_loop()
    process: asyncio.subprocess.Process | None = None
    early: list[signal.Signals] = []

    def pass_on(number: signal.Signals) -> None:
        if process is None:
            early.append(number)
        elif process.returncode is None and not (number in OF_TERMINAL and _in_foreground()):
            process.send_signal(number)

    for number in PASSED_ON:
        loop.add_signal_handler(number, pass_on, number)
    try:
        process = await _start(invocation, command, environment)
        for number in early:
            pass_on(number)
        code = await process.wait()
    finally:
        for number in PASSED_ON:
            loop.remove_signal_handler(number)
        if process is not None and process.returncode is None:
            await _end(process)
    return code if code >= 0 else KILLED_BASE - code


async def _start(
    invocation: Invocation, command: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command, cwd=invocation.cwd, env=dict(environment), stdin=invocation.stdin
        )
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no program {command[0]!r}") from error
    except OSError as error:
        raise UsageError(f"cannot run {command[0]!r}: {error.strerror}") from error


def _in_foreground() -> bool:
    """Return whether a terminal sends its signals to us and so to the program as well."""
    try:
        file = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(file) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(file)


async def _end(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    try:
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

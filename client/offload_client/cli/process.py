"""Running commands in a process of their own: signals, errors, exit codes."""

from __future__ import annotations

import asyncio
import signal
import traceback
from typing import TYPE_CHECKING

import click

from offload_client.invocation import Invocation
from offload_core.errors import BuildCanceledError, OffloadError, find_offload_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from offload_client.connections import Connections

INTERRUPTED = 130
TERMINATED = 143


def run_build_process(arguments: Sequence[str]) -> int:
    """Run `offload-build` in this process; return its exit code."""
    from offload_client.cli.build import build, parse_build
    from offload_client.resident.launch import start_helper

    invocation = Invocation.of_process(arguments)

    async def run(connections: Connections) -> None:
        await build(invocation, connections)

    try:
        parse_build(invocation)
    except click.exceptions.Exit as error:
        return error.exit_code
    except OffloadError as error:
        return report(invocation, error)
    code = run_async(invocation, run)
    if code == 0:
        start_helper(invocation)
    return code


def run_async(invocation: Invocation, function: Callable[[Connections], Awaitable[None]]) -> int:
    """Run a command with connections of its own; SIGINT and SIGTERM cancel it."""
    from offload_client.connections import Connections

    async def main() -> int:
        task = asyncio.current_task()
        code = 0

        def interrupt(value: int) -> None:
            nonlocal code
            code = value
            if task is not None:
                task.cancel()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, interrupt, INTERRUPTED)
        loop.add_signal_handler(signal.SIGTERM, interrupt, TERMINATED)
        try:
            async with Connections() as connections:
                return await guarded(invocation, function(connections))
        except asyncio.CancelledError:
            return report(invocation, BuildCanceledError("canceled")) and (code or INTERRUPTED)

    return asyncio.run(main())


async def guarded(invocation: Invocation, command: Awaitable[None]) -> int:
    """Await a command and turn its errors into sentences and exit codes."""
    try:
        await command
    except (Exception, BaseExceptionGroup) as error:
        return report(invocation, error)
    return 0


def report(invocation: Invocation, error: BaseException) -> int:
    """Print an error the way docker does; return the exit code."""
    known = find_offload_error(error)
    if known is None:
        if isinstance(error, BrokenPipeError):
            return 141
        invocation.err(f"ERROR: internal error: {type(error).__name__}: {error}")
        if invocation.environment.get("OFFLOAD_DEBUG"):
            invocation.err("".join(traceback.format_exception(error)))
        else:
            invocation.err("Set OFFLOAD_DEBUG=1 for details, and please report this.")
        return OffloadError.exit_code
    if not known.shown:
        invocation.err(f"ERROR: {known.message}")
    if known.hint:
        invocation.err(known.hint)
    return known.exit_code

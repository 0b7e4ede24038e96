"""Running commands in a process of their own: signals, errors, exit codes."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from offload_client.invocation import Invocation
from offload_core.errors import (
    BuildCanceledError,
    BuildFailedError,
    OffloadError,
    find_offload_error,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from offload_client.connections import Connections

INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141
"""What a shell shows for a process that SIGPIPE has ended."""


def run_build_process(arguments: Sequence[str]) -> int:
    """Run `offload-build` in this process; return its exit code."""
    from offload_client.cli.build import build, parse_build

    invocation = Invocation.of_process(arguments)
    options = None
    if arguments[:1] != ["bake"]:
        try:
            options = parse_build(invocation)
        except (OffloadError, OSError) as error:
            return report(invocation, error)
        if options is None:
            return 0

    async def run(connections: Connections) -> None:
        await build(invocation, connections, options)

    code = run_async(invocation, run)
    if code in (0, BuildFailedError.exit_code):
        from offload_client.resident.launch import start_helper

        start_helper(invocation)
    return code


def run_async(invocation: Invocation, function: Callable[[Connections], Awaitable[None]]) -> int:
    """Run a command with connections of its own; SIGINT and SIGTERM cancel it.

    A command may ask first what SIGINT means.
    """
    import asyncio

    async def main() -> int:
        task = asyncio.current_task()
        code = 0

        def interrupt(value: int) -> None:
            nonlocal code
            code = value
            if task is not None:
                task.cancel()

        loop = asyncio.get_running_loop()
        invocation.interrupts.cancel = lambda: interrupt(INTERRUPTED)
        loop.add_signal_handler(signal.SIGINT, invocation.interrupts.arrived)
        loop.add_signal_handler(signal.SIGTERM, interrupt, TERMINATED)
        from offload_client.connections import Connections

        try:
            async with Connections() as connections:
                result = await guarded(invocation, function(connections))
        except asyncio.CancelledError:
            report(invocation, BuildCanceledError("canceled"))
            return code or INTERRUPTED
        # Cancelling may end in an error of something that was interrupted.
        return code if code and result else result

    return asyncio.run(main())


async def guarded(invocation: Invocation, command: Awaitable[None]) -> int:
    """Await a command and turn its errors into sentences and exit codes."""
    try:
        await command
    except (Exception, BaseExceptionGroup) as error:
        from offload_client.bytepipe import in_thread

        failure = error
        # In a thread: a terminal that is stopped would hold up all other builds of the helper.
        return await in_thread(lambda: report(invocation, failure), name="report")
    return 0


def report(invocation: Invocation, error: BaseException) -> int:
    """Print an error the way docker does; return the exit code."""
    known = find_offload_error(error)
    if known is not None:
        if not known.shown:
            invocation.err(f"ERROR: {known.message}")
        from offload_client.cli.remedies import remedy

        hint = known.hint or remedy(known)
        if hint:
            invocation.err(hint)
        _show_trace(invocation, error)
        return known.exit_code
    if _is_broken_pipe(error):
        return BROKEN_PIPE
    invocation.err(f"ERROR: internal error: {type(error).__name__}: {error}")
    if not _show_trace(invocation, error):
        invocation.err("Use --debug for details, and please report this.")
    return OffloadError.exit_code


def _show_trace(invocation: Invocation, error: BaseException) -> bool:
    """Show where an error comes from, to whoever asked for it; return whether it was asked for."""
    asked = not {"-D", "--debug"}.isdisjoint(invocation.arguments)
    if not asked and not invocation.environment.get("OFFLOAD_DEBUG"):
        return False
    import traceback

    invocation.err("".join(traceback.format_exception(error)))
    return True


def _is_broken_pipe(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_broken_pipe, error.exceptions))
    return isinstance(error, BrokenPipeError)

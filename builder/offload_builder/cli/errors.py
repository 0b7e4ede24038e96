"""How commands end: one sentence and the exit code of the error."""

from __future__ import annotations

import sys
from typing import Any

import click
import structlog

from offload_core.errors import InternalError, find_offload_error

log = structlog.get_logger(__name__)


class ErrorGroup(click.Group):
    """A command group whose failures are a sentence for people, never a stack trace.

    "ERROR: sentence", then an indented hint, on standard error; the exit code is the error's.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and report how it failed."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(130)
        except Exception as error:
            ctx.exit(report(error))


def report(error: Exception) -> int:
    """Print an error and return its exit code."""
    known = find_offload_error(error)
    if known is None:
        log.error("command.failed", exc_info=error)
        known = InternalError(f"the command failed: {error or type(error).__name__}")
    print(f"ERROR: {known.message}", file=sys.stderr)
    if known.hint:
        print(f"  {known.hint}", file=sys.stderr)
    return known.exit_code

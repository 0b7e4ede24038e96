"""Options and arguments that several commands for sessions have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from offload_client.ci.system import in_pipeline
from offload_client.settings import Settings
from offload_core.errors import ConfigError
from offload_core.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.invocation import Invocation
    from offload_client.sessions.records import SessionRecord

MAX_ANSWER_BYTES = 1024


class Length(click.ParamType):  # type: ignore[type-arg]
    """A length of time such as 30s or 1h30m, as seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds."""
        if isinstance(value, float):
            return value
        try:
            return parse_duration(str(value))
        except ConfigError as error:
            self.fail(error.message, param, ctx)


def complete_sessions(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the sessions of this machine that a word may become."""
    from offload_client.invocation import Invocation
    from offload_client.sessions.records import list_records

    invocation = ctx.obj if isinstance(ctx.obj, Invocation) else Invocation.of_process(())
    names = [record.name for record in list_records(invocation)]
    return [name for name in names if name.startswith(incomplete)]


def session_argument(*, many: bool = False, required: bool = False) -> Callable[[Any], Any]:
    """Return the argument that names a session."""
    metavar = "SESSION" if required else "[SESSION]"
    return click.argument(
        "sessions" if many else "session",
        metavar=f"{metavar}..." if many else metavar,
        nargs=-1 if many else 1,
        required=required,
        shell_complete=complete_sessions,
    )


def settings_of(record: SessionRecord) -> Settings:
    """Return gateway and project of a session, which may be others than those configured here."""
    return Settings(record.gateway, record.project_id)


def can_ask(invocation: Invocation) -> bool:
    """Return whether somebody is there to answer a question."""
    return os.isatty(invocation.stdin) and not in_pipeline(invocation.environment)


async def agreed(invocation: Invocation, question: str) -> bool:
    """Ask on the terminal; anything but a yes is a no."""
    from offload_client.bytepipe import in_thread

    print(f"{question} [y/N] ", end="", file=invocation.stderr, flush=True)

    def read() -> str:
        return os.read(invocation.stdin, MAX_ANSWER_BYTES).decode("utf-8", "replace")

    return (await in_thread(read, name="answer")).strip().lower() in ("y", "yes")

"""`offload`: everything around builds: login, status, history; and sessions."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING

import click

from offload_core import VERSION
from offload_core.errors import OffloadError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "login": "Log in at a gateway with a token or an identity provider.",
    "logout": "Forget the login at a gateway.",
    "init": "Write the project file, and what a pipeline needs.",
    "status": "Show the gateway, its nodes, and who you are.",
    "whoami": "Show who you are at the gateway, and until when.",
    "builds": "List builds, or show one.",
    "attach": "Follow a build to its end.",
    "logs": "Print everything that a build printed.",
    "inspect": "Show what a build was made from, its steps and its result.",
    "pull": "Load the image of a build into the local container engine.",
    "push": "Push the image of a build from its node to registries.",
    "cancel": "End a queued or running build.",
    "install": "Make 'docker build' build on the pool.",
    "uninstall": "Undo 'install'.",
    "buildx": "Use the pool as a builder of stock docker buildx.",
    "exec": "Run a BuildKit client on the pool.",
    "cache": "Look at the layer cache, prune it, promote a branch.",
    "connect": "Let builds reach hosts of the network that you are in.",
    "policy": "Show what builds of a project may reach, and explain why.",
    "start": "Start a docker engine of your own on a node, and let docker use it.",
    "stop": "Stop sessions and remove everything of them.",
    "use": "Let docker use a session that runs.",
    "ps": "List sessions: yours, and those that are shared with you.",
    "images": "List what was built and can be run in a session.",
    "share": "Let further members use a session.",
    "usage": "Show how long members used sessions, and what that cost.",
    "diagnose": "Check a session and collect what helps to find a fault.",
    "version": "Show the versions of client, gateway, nodes and engines.",
}
FUNCTIONS = {"exec": "execute"}
"""Where the function cannot have the name of its command."""
SESSION_COMMANDS = frozenset(
    ("start", "stop", "use", "ps", "images", "share", "usage", "diagnose", "version")
)
"""Those whose module has "session" before its name."""


class LazyGroup(click.Group):
    """Loads the module of a command only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        if cmd_name not in COMMANDS:
            return None
        place = f"session{cmd_name}" if cmd_name in SESSION_COMMANDS else cmd_name
        module = importlib.import_module(f"offload_client.cli.{place}")
        command: click.Command = getattr(module, FUNCTIONS.get(cmd_name, cmd_name))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="offload")
def offload() -> None:
    """Work with a pool of remote builder nodes: builds, and sessions for 'docker run'.

    \b
    Examples:
      offload login https://gateway.example:7443
      offload status
      offload logs 3f9a
      offload start && docker run --rm hello-world && offload stop
      eval "$(_OFFLOAD_COMPLETE=bash_source offload)"    # completion; also zsh_source, fish_source
    """


def main(arguments: Sequence[str]) -> int:
    """Run a command line; return its exit code."""
    from offload_client.cli.process import report
    from offload_client.invocation import Invocation

    invocation = Invocation.of_process(arguments)
    try:
        result = offload.main(list(arguments), "offload", standalone_mode=False, obj=invocation)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return 130
    except click.NoSuchOption as error:
        return report(invocation, UsageError(f"unknown flag: {error.option_name}"))
    except click.UsageError as error:
        usage = error.ctx.get_usage() if error.ctx else ""
        return report(invocation, UsageError(error.format_message(), hint=usage))
    except OffloadError as error:
        return report(invocation, error)
    except OSError as error:
        return report(invocation, error)
    finally:
        if sys.stdout is not None:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
    return result if isinstance(result, int) else 0

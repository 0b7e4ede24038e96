"""`offload-builder`: the commands of those who run a pool. Each is imported when it is called."""

from __future__ import annotations

import importlib

import click

from offload_builder.cli.errors import ErrorGroup
from offload_core import VERSION

COMMANDS = {
    "up": "Run a gateway and nodes on this machine, ready to build.",
    "gateway": "Run the gateway.",
    "node": "Run a node.",
    "token": "Create, list and revoke tokens.",
    "project": "Create and list projects.",
    "policy": "Say what builds may reach: check, apply, explain, compare.",
    "session": "Look at the sessions of members, and end them.",
    "audit": "Show who did what: logins, tokens, builds, caches.",
    "ca": "Replace the certificate authority without an outage.",
    "identity": "Check and try the rules for identity providers.",
    "doctor": "Find missing parts and say how to get them.",
}


class LazyGroup(ErrorGroup):
    """Loads the module of a command only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"offload_builder.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="offload-builder")
def main() -> None:
    """Run the service side of offload-build: gateway, nodes, tokens, projects.

    \b
    Examples:
      offload-builder up --nodes 2 --minio
      offload-builder token create --role member alice
    """


if __name__ == "__main__":
    main()

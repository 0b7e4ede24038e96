"""Options that many commands have."""

from __future__ import annotations

import click

gateway_option = click.option(
    "--gateway", metavar="URL", help="Gateway to use instead of the configured one."
)
project_option = click.option(
    "--project", metavar="NAME", help="Project instead of the configured one."
)
pretty_or_json = click.option(
    "-f",
    "--format",
    "output",
    type=click.Choice(("pretty", "json")),
    default="pretty",
    show_default=True,
)

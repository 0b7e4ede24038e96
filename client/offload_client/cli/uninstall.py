"""`offload uninstall`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from offload_client.invocation import Invocation


@click.command()
@click.pass_obj
def uninstall(invocation: Invocation) -> None:
    """Undo 'offload install': docker's CLI is as it was."""
    from offload_client.dockercli.composebuilds import ComposeBuilds
    from offload_client.dockercli.installation import Installation

    # The builder first: the directories that install has made go last.
    compose = ComposeBuilds(invocation).uninstall()
    if Installation(invocation).uninstall() or compose:
        invocation.out("docker build and docker compose are docker's own again.")
    else:
        invocation.out("There was nothing to undo.")

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
    from offload_client.dockercli.installation import Installation

    if Installation(invocation).uninstall():
        invocation.out("docker build is docker's own again.")
    else:
        invocation.out("There was nothing to undo.")

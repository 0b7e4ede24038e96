"""`offload install`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from offload_client.invocation import Invocation


@click.command()
@click.option("--force", is_flag=True, help="Take the place of another builder alias or plugin.")
@click.pass_obj
def install(invocation: Invocation, force: bool) -> None:
    """Make 'docker build' build on the pool.

    Puts the plugin "offload" into docker's CLI, and the alias "builder" for it into docker's
    config.json. 'offload uninstall' brings back what was there.
    """
    from offload_client.dockercli.installation import Installation

    installation = Installation(invocation)
    installation.install(force=force)
    invocation.out(
        f"docker build, docker builder build and docker bake now build on the pool.\n"
        f"Changed: {installation.config_path}, {installation.link}\n"
        "Undo it with: offload uninstall"
    )

"""`offload install`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.option("--force", is_flag=True, help="Take the place of another alias, plugin or builder.")
@click.pass_obj
def install(invocation: Invocation, force: bool) -> int:
    """Make 'docker build' and 'docker compose build' build on the pool.

    Puts the plugin "offload" into docker's CLI, and the alias "builder" for it into docker's
    config.json. For docker compose, which builds with buildx, it makes the builder "offload" and
    chooses it; that needs a login. 'offload uninstall' brings back what was there.
    """
    from offload_client.cli.process import run_async
    from offload_client.dockercli.composebuilds import ComposeBuilds
    from offload_client.dockercli.installation import Installation
    from offload_core.errors import OffloadError

    installation = Installation(invocation)
    installation.install(force=force)
    invocation.out(
        f"docker build, docker builder build and docker bake now build on the pool.\n"
        f"Changed: {installation.config_path}, {installation.link}"
    )
    compose = ComposeBuilds(invocation)

    async def choose_builder(connections: Connections) -> None:
        try:
            builder = await compose.install(connections, force=force)
        except OffloadError as error:
            hint = f"; {error.hint}" if error.hint else ""
            invocation.err(
                f"docker compose builds as before: {error.message}{hint}\n"
                "Then run 'offload install' again."
            )
            return
        invocation.out(
            "docker compose and docker buildx now build on the pool, in the project "
            f'"{builder.project}", by the builder "{builder.name}".'
        )
        if not compose.has_buildx:
            invocation.err("docker buildx, which docker compose builds with, is not installed")

    code = run_async(invocation, choose_builder)
    invocation.out("Undo it with: offload uninstall")
    return code

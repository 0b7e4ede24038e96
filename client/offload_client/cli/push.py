"""`offload push`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.units import format_size

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.argument("build_id", metavar="BUILD")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@gateway_option
@click.pass_obj
def push(invocation: Invocation, build_id: str, names: tuple[str, ...], gateway: str | None) -> int:
    """Push the image of a build that has ended from its node to registries.

    Nothing passes this machine but your logins there, which are those of docker login. Prints the
    digest. BUILD may be the beginning of an id.

    \b
    Examples:
      offload push 3f9a registry.example/app:1 registry.example/app:latest
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        from offload_client.build.finishedimage import find_image
        from offload_client.build.options import check_tags

        wanted = check_tags(names)
        calls = await GatewayCalls.open(invocation, settings, connections)
        identity = await connections.identity(invocation, settings.gateway)
        image = await find_image(build_id, calls, connections, identity)
        digest, sent_bytes = await image.push(wanted, invocation.environment)
        for name in wanted:
            invocation.err(f"pushed {name}")
        invocation.err(f"{format_size(sent_bytes)} sent; the registry had the rest")
        invocation.out(digest)

    return run_async(invocation, run)

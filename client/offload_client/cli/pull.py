"""`offload pull`."""

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
@click.option(
    "-t",
    "--tag",
    "tags",
    multiple=True,
    metavar="NAME",
    help='Name for the image (format: "[registry/]repository[:tag]"); may be given several times.',
)
@click.option(
    "--platform", "platforms", multiple=True, metavar="PLATFORM", help="Only these platforms."
)
@click.option(
    "--progress",
    default="auto",
    show_default=True,
    metavar="MODE",
    help="Set type of progress output (auto, none, plain, quiet, rawjson, tty).",
)
@gateway_option
@click.pass_obj
def pull(
    invocation: Invocation,
    build_id: str,
    tags: tuple[str, ...],
    platforms: tuple[str, ...],
    progress: str,
    gateway: str | None,
) -> int:
    """Load the image of a build that has ended into the local container engine.

    Only layers that the engine lacks travel. Prints the image id. BUILD may be the beginning of
    an id.

    \b
    Examples:
      offload pull 3f9a -t app
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        from offload_client.build.finishedimage import find_image
        from offload_client.build.options import check_tags, parse_platforms
        from offload_client.load.loader import load_image
        from offload_client.progress.display import finish_display, make_display, parse_progress

        names, wanted, mode = check_tags(tags), parse_platforms(platforms), parse_progress(progress)
        calls = await GatewayCalls.open(invocation, settings, connections)
        identity = await connections.identity(invocation, settings.gateway)
        with make_display(mode, invocation.stderr, invocation.environment) as display:
            image = await find_image(build_id, calls, connections, identity)
            with display.local_step("[offload] loading image into docker") as step:
                loaded = await load_image(
                    image.source,
                    image.digest,
                    names,
                    platforms=wanted,
                    environment=invocation.environment,
                    progress=lambda now: step.progress(
                        "receiving layers", now.bytes_received, now.bytes_total
                    ),
                )
                step.log(
                    f"{loaded.layers_received} layers received "
                    f"({format_size(loaded.bytes_received)}), {loaded.layers_reused} were there"
                )
            await finish_display(display, None)
        invocation.out(loaded.image_id)

    return run_async(invocation, run)

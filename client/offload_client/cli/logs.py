"""`offload logs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.progress.display import make_display
from offload_client.settings import resolve_settings
from offload_proto.v1.builds_service_pb2 import LogsRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.argument("build_id", metavar="BUILD")
@click.option("-f", "--follow", is_flag=True, help="Stay until the build ends.")
@click.option(
    "--progress",
    type=click.Choice(("plain", "rawjson")),
    default="plain",
    show_default=True,
    help="Form of the output.",
)
@click.option("--gateway", metavar="URL", help="Gateway to use instead of the configured one.")
@click.pass_obj
def logs(
    invocation: Invocation, build_id: str, progress: str, gateway: str | None, *, follow: bool
) -> int:
    """Print everything that a build printed; BUILD may be the beginning of an id.

    \b
    Examples:
      offload logs 3f9a
      offload logs -f 3f9a
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = LogsRequest(build_id=build_id, follow=follow)
        with make_display(progress, invocation.stdout, invocation.environment) as display:
            async for message in calls.stream(calls.builds.Logs, request):
                for batch in message.batches:
                    display.feed(batch)
            display.finish(None)

    return run_async(invocation, run)

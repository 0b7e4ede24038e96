"""`offload logs`."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.progress.display import make_display
from offload_client.settings import resolve_settings

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
@gateway_option
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
        from offload_client.build.following import read_log
        from offload_client.bytepipe import in_thread

        calls = await GatewayCalls.open(invocation, settings, connections)
        with make_display(
            progress, invocation.stdout, invocation.environment, folds=False
        ) as display:
            async with aclosing(read_log(calls, build_id, follow=follow)) as log:
                async for batch in log:
                    display.feed(batch)
                    await display.room()
            await in_thread(lambda: display.finish(None), name="display-finish")

    return run_async(invocation, run)

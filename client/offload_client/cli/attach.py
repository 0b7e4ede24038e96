"""`offload attach`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.node_service_pb2 import Result


@click.command()
@click.argument("build_id", metavar="BUILD")
@click.option(
    "--progress",
    default="auto",
    show_default=True,
    metavar="MODE",
    help="Set type of progress output (auto, none, plain, quiet, rawjson, tty).",
)
@gateway_option
@click.pass_obj
def attach(invocation: Invocation, build_id: str, progress: str, gateway: str | None) -> int:
    """Follow a build from its beginning to its end; BUILD may be the beginning of an id.

    The exit code is that of the build. Ctrl-C leaves; the build goes on. A build that was lost with
    its node and repeated is followed on to the end of its repeat.

    \b
    Examples:
      offload attach 3f9a
      offload attach --progress plain 3f9a
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        from offload_client.build.following import Following
        from offload_client.build.runner import error_of
        from offload_client.progress.display import finish_display, make_display, parse_progress
        from offload_client.progress.summary import Totals
        from offload_core.errors import BuildCanceledError

        mode = parse_progress(progress)
        calls = await GatewayCalls.open(invocation, settings, connections)
        identity = await connections.identity(invocation, settings.gateway)
        left = asyncio.Event()
        result: Result | None = None

        def leave() -> bool:
            if left.is_set():
                return False
            left.set()
            return True

        with make_display(mode, invocation.stderr, invocation.environment) as display:
            following = Following(build_id, calls, connections, identity, display)
            looking = asyncio.ensure_future(following.run())
            leaving = asyncio.ensure_future(left.wait())
            try:
                with invocation.interrupts.handled_by(leave):
                    await asyncio.wait((looking, leaving), return_when=asyncio.FIRST_COMPLETED)
                if looking.done():
                    result = looking.result()
            finally:
                looking.cancel()
                leaving.cancel()
                await asyncio.wait((looking,))
            if result is None:
                # The command is, not the build. Raised here: the display then waits for a reader
                # that has stopped reading no longer than after any interrupt.
                gone = BuildCanceledError(
                    "left", hint=f"the build goes on; follow it with: offload attach {build_id}"
                )
                gone.shown = True
                raise gone
            failure = result.failure if result.HasField("failure") else None
            await finish_display(display, failure, Totals.of(result.stats))
        if failure is not None:
            raise error_of(failure)

    return run_async(invocation, run)

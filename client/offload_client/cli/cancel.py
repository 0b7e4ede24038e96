"""`offload cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_proto.v1.builds_service_pb2 import CancelRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.argument("build_id", metavar="BUILD")
@gateway_option
@click.pass_obj
def cancel(invocation: Invocation, build_id: str, gateway: str | None) -> int:
    """End a queued or running build; BUILD may be the beginning of an id."""
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        await calls.call(calls.builds.Cancel, CancelRequest(build_id=build_id))
        invocation.out(build_id)

    return run_async(invocation, run)

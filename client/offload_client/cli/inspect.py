"""`offload inspect`."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option, pretty_or_json
from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.argument("build_id", metavar="BUILD")
@pretty_or_json
@gateway_option
@click.pass_obj
def inspect(invocation: Invocation, build_id: str, output: str, gateway: str | None) -> int:
    """Show what a build was made from, its steps and its result.

    BUILD may be the beginning of an id.

    \b
    Examples:
      offload inspect 3f9a
      offload inspect 3f9a --format json
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        from offload_client.build.following import read_log
        from offload_client.cli.inspection import StepList, as_json, as_text
        from offload_proto.v1.builds_service_pb2 import GetRequest

        calls = await GatewayCalls.open(invocation, settings, connections)
        build = (await calls.call(calls.builds.Get, GetRequest(build_id=build_id))).build
        steps = StepList()
        async with aclosing(read_log(calls, build.build_id, follow=False)) as log:
            async for batch in log:
                steps.take(batch)
        if output == "json":
            invocation.out(json.dumps(as_json(build, steps), indent=2))
        else:
            invocation.out(as_text(build, steps))

    return run_async(invocation, run)

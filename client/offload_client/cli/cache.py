"""`offload cache`: what the layer cache of a project holds, and what people do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.cacheprune import prune
from offload_client.cli.cacheusage import usage
from offload_client.cli.cachewhy import why
from offload_client.cli.options import gateway_option, project_option
from offload_client.cli.process import run_async
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_proto.v1.cache_service_pb2 import PromoteRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation

PROMOTE_SECONDS = 75.0


@click.group()
def cache() -> None:
    """Look at the layer cache, prune it, promote a branch, or ask why a step ran.

    \b
    Examples:
      offload cache usage
      offload cache prune --unused-for 14d
      offload cache why 3f9a
    """


@cache.command()
@click.argument("branch", metavar="BRANCH")
@click.option(
    "--to", "target", metavar="BRANCH", help="Branch that gets the entries.  [default: the pool's]"
)
@project_option
@gateway_option
@click.pass_obj
def promote(
    invocation: Invocation,
    branch: str,
    target: str | None,
    project: str | None,
    gateway: str | None,
) -> int:
    """Copy the cache entries of BRANCH to another branch, as after a merge.

    Only administrators and pipelines may do so. Entries that an untrusted member wrote are left
    out.

    \b
    Examples:
      offload cache promote feature/login
      offload cache promote feature/login --to release-2
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = PromoteRequest(
            project_id=settings.project, from_scope=branch, to_scope=target or ""
        )
        reply = await calls.call(calls.cache.Promote, request, timeout=PROMOTE_SECONDS)
        result = reply.result
        if result.refused:
            invocation.err(f"WARNING: {result.refused} entries of untrusted members were left out")
        invocation.out(f"Promoted cache entries: {result.entries}")

    return run_async(invocation, run)


cache.add_command(usage)
cache.add_command(prune)
cache.add_command(why)

"""`offload version`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option, pretty_or_json
from offload_client.cli.process import run_async
from offload_client.settings import resolve_settings
from offload_core import VERSION
from offload_core.errors import ConfigError, OffloadError

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings


@click.command()
@gateway_option
@pretty_or_json
@click.pass_obj
def version(invocation: Invocation, gateway: str | None, output: str) -> int:
    """Show the versions of this client, the gateway, its nodes, and the engines of sessions.

    What cannot be asked is left out, with a sentence on why; the exit code is 0 all the same.

    \b
    Examples:
      offload version
      offload version -f json
    """
    found: dict[str, Any] = {"client": VERSION}
    try:
        settings = resolve_settings(invocation, gateway=gateway)
    except ConfigError as error:
        found["error"] = error.message
        _show(invocation, found, output)
        return 0

    async def run(connections: Connections) -> None:
        try:
            found.update(await versions(invocation, settings, connections))
        except OffloadError as error:
            found["error"] = error.message
        _show(invocation, found, output)

    return run_async(invocation, run)


async def versions(
    invocation: Invocation, settings: Settings, connections: Connections
) -> dict[str, Any]:
    """Return the versions of gateway, nodes and engines, for JSON.

    Raises:
        OffloadError: the gateway cannot be asked.
    """
    from offload_client.sessions.gatewaycalls import SessionCalls, is_open
    from offload_proto.v1.identity_service_pb2 import ListNodesRequest

    sessions = await SessionCalls.open_for(invocation, settings, connections)
    me = await sessions.who()
    calls = sessions.calls
    nodes = (await calls.call(calls.admin.ListNodes, ListNodesRequest())).nodes
    engines = {
        session.spec.name: session.engine_version
        for session in await sessions.listed()
        if is_open(session) and session.owner == me.member and session.engine_version
    }
    return {
        "gateway": {"address": settings.gateway, "version": me.gateway_version},
        "nodes": [
            {
                "node_id": node.node_id,
                "version": node.version,
                "buildkit_version": node.buildkit_version,
            }
            for node in nodes
        ],
        "engines": engines,
    }


def _show(invocation: Invocation, found: dict[str, Any], output: str) -> None:
    if output == "json":
        invocation.out(json.dumps(found, indent=2))
        return
    rows = [("Client", found["client"])]
    if gateway := found.get("gateway"):
        rows.append(("Gateway", f"{gateway['version']} ({gateway['address']})"))
    for node in found.get("nodes", ()):
        buildkit = node["buildkit_version"] or "unknown"
        rows += [(f"Node {node['node_id']}", f"{node['version']}, BuildKit {buildkit}")]
    engines = found.get("engines", {}).items()
    rows += [(f"Session {name}", f"docker engine {engine}") for name, engine in engines]
    width = max(len(name) for name, _ in rows) + 3
    for name, text in rows:
        invocation.out(name.ljust(width) + text)
    if error := found.get("error"):
        invocation.err(f"WARNING: {error}")

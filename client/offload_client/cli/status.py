"""`offload status`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option, pretty_or_json
from offload_client.cli.process import run_async
from offload_client.cli.tables import ago, format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.units import format_size
from offload_proto.v1.identity_service_pb2 import (
    ListNodesRequest,
    ListProjectsRequest,
    Role,
    WhoAmIRequest,
)

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.identity_service_pb2 import NodeInfo, WhoAmIResponse


@click.command()
@gateway_option
@pretty_or_json
@click.pass_obj
def status(invocation: Invocation, gateway: str | None, output: str) -> int:
    """Show the gateway, its nodes, and who you are."""
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        me: WhoAmIResponse = await calls.call(calls.identity.WhoAmI, WhoAmIRequest())
        projects = await calls.call(calls.admin.ListProjects, ListProjectsRequest())
        nodes = (await calls.call(calls.admin.ListNodes, ListNodesRequest())).nodes
        names = [project.project_id for project in projects.projects]
        role = Role.Name(me.role).removeprefix("ROLE_").lower()
        if output == "json":
            invocation.out(
                json.dumps(
                    {
                        "gateway": settings.gateway,
                        "gateway_version": me.gateway_version,
                        "member": me.member,
                        "role": role,
                        "project": settings.project,
                        "projects": names,
                        "token_expires_at": rfc3339(me.token_expires_at),
                        "nodes": [_node_json(node) for node in nodes],
                    },
                    indent=2,
                )
            )
            return
        invocation.out(f"Gateway   {settings.gateway} (version {me.gateway_version})")
        invocation.out(f"Member    {me.member} ({role})")
        invocation.out(f"Project   {settings.project} (of {', '.join(names) or 'none'})")
        if not nodes:
            invocation.out("Nodes     none attached; builds wait until one is")
            return
        invocation.out("")
        headings = ["NODE", "STATE", "BUILDS", "PLATFORMS", "DISK FREE", "SEEN", "HEALTH"]
        rows = [_node_row(node) for node in nodes]
        if any(node.devices for node in nodes):
            # Most pools have none.
            headings.insert(4, "DEVICES")
            for node, row in zip(nodes, rows, strict=True):
                row.insert(4, ",".join(node.devices) or "none")
        invocation.out(format_table(headings, rows))

    return run_async(invocation, run)


def _node_row(node: NodeInfo) -> list[str]:
    return [
        node.node_id,
        node.state,
        f"{node.running}/{node.slots}",
        _platforms(node),
        format_size(node.disk_free_bytes),
        ago(node.last_seen_at),
        node.health or "good",
    ]


def _platforms(node: NodeInfo) -> str:
    native, emulated = ",".join(node.platforms), ",".join(node.emulated_platforms)
    return f"{native} (emulated: {emulated})" if emulated else native


def _node_json(node: NodeInfo) -> dict[str, Any]:
    return {
        "node_id": node.node_id,
        "state": node.state,
        "running": node.running,
        "slots": node.slots,
        "platforms": list(node.platforms),
        "emulated_platforms": list(node.emulated_platforms),
        "devices": list(node.devices),
        "version": node.version,
        "buildkit_version": node.buildkit_version,
        "last_seen_at": rfc3339(node.last_seen_at),
        "disk_free_bytes": node.disk_free_bytes,
        "health": node.health,
    }

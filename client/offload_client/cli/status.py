"""`offload status`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option, pretty_or_json
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import session_argument
from offload_client.cli.tables import ago, format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.errors import GatewayUnreachableError, OffloadError
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


FROM_HELPER = ("name", "context", "in_use", "gateway", "helper", "ports", "warning")
LIVE = (
    "state", "idle", "reason", "running_containers", "open_connections", "disk_bytes",
    "bytes_to_session", "bytes_from_session", "seconds_until_idle", "seconds_until_removal",
)  # fmt: skip
"""What a helper hears from the node at once, and the gateway somewhat later."""


@click.command()
@session_argument()
@click.option(
    "-s", "--sessions", is_flag=True, help="Only sessions of this machine, without the gateway."
)
@click.option("-w", "--watch", is_flag=True, help="With --sessions: again and again, until Ctrl-C.")
@gateway_option
@pretty_or_json
@click.pass_obj
def status(
    invocation: Invocation,
    session: str | None,
    gateway: str | None,
    output: str,
    *,
    sessions: bool,
    watch: bool,
) -> int:
    """Show the gateway, its nodes, who you are, and the sessions that this machine uses.

    With --sessions, --watch or a SESSION only sessions are shown, as their helpers on this machine
    know them: that is fast, and works while the gateway is away.

    \b
    Examples:
      offload status
      offload status --sessions
      offload status default -f json
      offload status --watch
    """
    if sessions or watch or session:
        from offload_client.sessions.faststatus import show_sessions

        return show_sessions(invocation, session, output, watch=watch)
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        try:
            await pool(connections)
        except GatewayUnreachableError:
            views = await here(invocation)
            if views and output == "pretty":
                _show_sessions(invocation, views)
            raise

    async def pool(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        me: WhoAmIResponse = await calls.call(calls.identity.WhoAmI, WhoAmIRequest())
        projects = await calls.call(calls.admin.ListProjects, ListProjectsRequest())
        nodes = (await calls.call(calls.admin.ListNodes, ListNodesRequest())).nodes
        names = [project.project_id for project in projects.projects]
        views = await _views(invocation, calls)
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
                        "sessions": views,
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
            _show_sessions(invocation, views)
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
        _show_sessions(invocation, views)

    return run_async(invocation, run)


async def here(invocation: Invocation) -> list[dict[str, Any]]:
    """Return what the helpers of this machine's sessions say."""
    from offload_client.bytepipe import in_thread
    from offload_client.sessions.faststatus import session_views

    return await in_thread(lambda: session_views(invocation), name="ask-helpers")


async def _views(invocation: Invocation, calls: GatewayCalls) -> list[dict[str, Any]]:
    """Return the sessions of this machine, with what the gateway adds to what helpers say."""
    views = await here(invocation)
    if not views:
        return []
    from offload_client.cli.sessionrows import session_view
    from offload_client.sessions.gatewaycalls import SessionCalls

    try:
        listed = await SessionCalls(calls).listed()
    except OffloadError:
        # Of another gateway, or one that has no sessions yet.
        return views
    known = {session.session_id: session_view(session) for session in listed}
    return [_merged(view, known.get(view["session_id"], {})) for view in views]


def _merged(helper: dict[str, Any], gateway: dict[str, Any]) -> dict[str, Any]:
    """Return a view with what each of both knows better; names are those of this machine."""
    fresh = {key: helper[key] for key in FROM_HELPER if key in helper}
    if helper["state"] not in ("unknown", "connecting"):
        fresh |= {key: helper[key] for key in LIVE if helper.get(key) is not None}
    return helper | gateway | fresh


def _show_sessions(invocation: Invocation, views: list[dict[str, Any]]) -> None:
    from offload_client.sessions.statusview import pretty_lines

    for view in views:
        invocation.out("")
        for line in pretty_lines(view):
            invocation.out(line)


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

"""`offload usage`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option, pretty_or_json, project_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import Length
from offload_client.cli.sessionrows import cost_json, money
from offload_client.cli.tables import format_table
from offload_client.settings import resolve_settings
from offload_core.units import format_duration

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.option(
    "--since",
    type=Length(),
    metavar="DURATION",
    help="Sessions of so long ago and later, for example 7d (default: 30d).",
)
@project_option
@gateway_option
@pretty_or_json
@click.pass_obj
def usage(
    invocation: Invocation,
    since: float | None,
    project: str | None,
    gateway: str | None,
    output: str,
) -> int:
    """Show how long the members of a project used sessions, and what that cost.

    Time in pause does not count. Costs are shown where the pool has rates.

    \b
    Examples:
      offload usage
      offload usage --project shop --since 7d -f json
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)

    async def run(connections: Connections) -> None:
        from offload_client.sessions.gatewaycalls import SessionCalls

        calls = await SessionCalls.open_for(invocation, settings, connections)
        begin = None if since is None else time.time() - since
        members = await calls.usage(settings.project, begin)
        if output == "json":
            rows = [
                {
                    "member": one.member,
                    "sessions": one.sessions,
                    "used_seconds": round(one.used.ToMilliseconds() / 1000, 3),
                    "cost": cost_json(one.cost) if one.HasField("cost") else None,
                }
                for one in members
            ]
            invocation.out(json.dumps({"project": settings.project, "members": rows}, indent=2))
            return
        if not members:
            invocation.out(f"nobody used a session of project {settings.project}")
            return
        table = [
            (
                one.member,
                str(one.sessions),
                format_duration(one.used.ToMilliseconds() / 1000),
                money(one.cost) if one.HasField("cost") else "-",
            )
            for one in members
        ]
        invocation.out(format_table(("MEMBER", "SESSIONS", "TIME", "COST"), table))

    return run_async(invocation, run)

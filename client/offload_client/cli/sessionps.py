"""`offload ps`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionrows import fill_template, session_row, session_view
from offload_client.cli.tables import format_table
from offload_client.settings import resolve_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation

COLUMNS = {
    "SESSION ID": "ID",
    "NAME": "Name",
    "OWNER": "Owner",
    "PROJECT": "Project",
    "STATE": "State",
    "NODE": "Node",
    "CREATED": "Created",
    "TIME USED": "Used",
    "COST": "Cost",
    "DOCKER CONTEXT": "Context",
}


@click.command()
@click.option("-a", "--all", "ended", is_flag=True, help="Also those that ended in the last days.")
@click.option("-q", "--quiet", is_flag=True, help="Print IDs only.")
@click.option("--project", metavar="NAME", help="Only sessions of this project.")
@gateway_option
@click.option(
    "--format",
    "output",
    default="table",
    show_default=True,
    metavar="FORMAT",
    help='"table", "json" (one object in each line), or a template such as "{{.ID}} {{.State}}".',
)
@click.pass_obj
def ps(
    invocation: Invocation,
    project: str | None,
    gateway: str | None,
    output: str,
    *,
    ended: bool,
    quiet: bool,
) -> int:
    """List sessions: yours, and those that are shared with you.

    Administrators see all. "*" marks the one that docker uses.

    \b
    Examples:
      offload ps
      offload ps --all --format json
      offload ps --format '{{.ID}} {{.Owner}} {{.State}}'
    """
    from offload_client.sessions.attaching import Attachments

    settings = resolve_settings(invocation, gateway=gateway)
    local = Attachments(invocation)
    here = {record.session_id: record.context for record in local.records()}
    current = local.contexts.current()

    async def run(connections: Connections) -> None:
        from offload_client.sessions.gatewaycalls import SessionCalls

        calls = await SessionCalls.open_for(invocation, settings, connections)
        sessions = await calls.listed(project=project or "", ended=ended)
        if quiet:
            lines = [session.session_id for session in sessions]
        elif output == "json":
            lines = [
                json.dumps(session_view(one) | {"context": here.get(one.session_id, "")})
                for one in sessions
            ]
        else:
            rows = [
                session_row(one, here=here.get(one.session_id, ""), current=current)
                for one in sessions
            ]
            lines = _lines(output, rows)
        for line in lines:
            invocation.out(line)

    return run_async(invocation, run)


def _lines(output: str, rows: Sequence[dict[str, str]]) -> list[str]:
    if output != "table":
        return [fill_template(output, row) for row in rows]
    columns = dict(COLUMNS)
    if all(row["Cost"] == "-" for row in rows):
        # Most pools have no rates.
        del columns["COST"]
    cells = [[row[name] for name in columns.values()] for row in rows]
    return [format_table(list(columns), cells)]

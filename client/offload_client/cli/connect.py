"""`offload connect`: builds reach hosts of the network that this command runs in."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.process import run_async
from offload_client.cli.tables import ago, format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.errors import UsageError

if TYPE_CHECKING:
    from offload_client.connect.session import ConnectorSession
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings
    from offload_proto.v1.connector_service_pb2 import Connector


@click.command()
@click.option(
    "--allow", "allow", metavar="HOST:PORT[=ADDRESS:PORT]", multiple=True,
    help="Host that builds may reach, and where it is found if elsewhere; may be repeated.",
)  # fmt: skip
@click.option("--name", metavar="NAME", help="Name of the connector instead of the machine's.")
@click.option("--list", "listed", is_flag=True, help="List the connectors that are online.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line for each connection.")
@click.option("--project", metavar="NAME", help="Project instead of the configured one.")
@click.option("--gateway", metavar="URL", help="Gateway to use instead of the configured one.")
@click.option(
    "--format", "output", type=click.Choice(("text", "json")), default="text", show_default=True,
    help="Form of the output; json has one event in each line.",
)  # fmt: skip
@click.pass_obj
def connect(
    invocation: Invocation,
    allow: tuple[str, ...],
    name: str | None,
    listed: bool,
    verbose: bool,
    project: str | None,
    gateway: str | None,
    output: str,
) -> int:
    """Let builds of the project reach hosts of this network, for as long as this command runs.

    Only what is allowed here, and what a rule with via = "connector" of the pool's policy names,
    is reached. Nothing listens here: the command calls the gateway and the nodes.

    \b
    Examples:
      offload connect --allow registry.corp.example.com:443
      offload connect --allow packages.office:80=127.0.0.1:8081 --name office-1 -v
      offload connect --list
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)
    if listed:
        if allow or name:
            raise UsageError("--list goes without --allow and --name")

        async def show(connections: Connections) -> None:
            await _list(invocation, settings, connections, output)

        return run_async(invocation, show)
    from offload_client.connect.allowed import parse_allowed
    from offload_client.connect.report import ConnectorReport
    from offload_client.connect.session import ConnectorSession

    places = parse_allowed(allow)
    called = name or socket.gethostname().partition(".")[0]
    report = ConnectorReport(
        invocation,
        name=called,
        project=settings.project,
        gateway=settings.gateway,
        verbose=verbose,
        as_json=output == "json",
    )

    async def run(connections: Connections) -> None:
        session = ConnectorSession(invocation, settings, connections, places, called, report)
        await _until_interrupted(invocation, session)

    return run_async(invocation, run)


async def _until_interrupted(invocation: Invocation, session: ConnectorSession) -> None:
    """Run a connector; the first interrupt ends it as it should end."""
    work: asyncio.Task[None] = asyncio.ensure_future(session.run())

    def interrupted() -> bool:
        return work.cancel()

    with invocation.interrupts.handled_by(interrupted):
        try:
            await asyncio.wait((work,))
        finally:
            work.cancel()
            await asyncio.wait((work,))
    if not work.cancelled():
        work.result()


async def _list(
    invocation: Invocation, settings: Settings, connections: Connections, output: str
) -> None:
    from offload_proto.v1.connector_service_pb2 import ListConnectorsRequest

    calls = await GatewayCalls.open(invocation, settings, connections)
    request = ListConnectorsRequest(project_id=settings.project)
    found = (await calls.call(calls.connectors().ListConnectors, request)).connectors
    if output == "json":
        for item in found:
            invocation.out(json.dumps(connector_json(item)))
        return
    if not found:
        invocation.out(f"no connector of project {settings.project} is online")
        return
    rows = [
        (item.name, item.member, item.address, ago(item.connected_at), _reachable(item))
        for item in found
    ]
    invocation.out(format_table(("NAME", "MEMBER", "FROM", "SINCE", "REACHABLE"), rows))


def connector_json(item: Connector) -> dict[str, Any]:
    """Return a connector for machines; field names are those of offload.v1.Connector."""
    return {
        "name": item.name,
        "member": item.member,
        "address": item.address,
        "connected_at": rfc3339(item.connected_at),
        "destinations": [
            {
                "host": one.destination.host,
                "port": one.destination.port,
                "permitted": one.permitted,
                "reason": one.reason,
            }
            for one in item.destinations
        ],
    }


def _reachable(item: Connector) -> str:
    found = [
        f"{one.destination.host}:{one.destination.port}"
        for one in item.destinations
        if one.permitted
    ]
    return ", ".join(found) or "nothing: no rule of the policy names it"

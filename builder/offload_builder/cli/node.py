"""`offload-builder node`: one node of the pool."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import (
    gateway_members,
    gateway_options,
    gateway_records,
    load_gateway_config,
    operator,
)
from offload_builder.cli.running import run_until_signal
from offload_builder.cli.tables import format_option, print_records

if TYPE_CHECKING:
    from offload_builder.gateway.enrolments import Enrolment


@click.group(invoke_without_command=True)
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file; see docs/configuration.md.",
)
@click.option("--gateway", help="Address of the gateway, HOST:PORT.")
@click.option(
    "--data", type=click.Path(file_okay=False), help="Directory for all of the node's data."
)
@click.option("--node-id", help="Name of the node.")
@click.option("--listen", help="Address for clients, HOST:PORT.")
@click.option("--isolation", help="Network of builds: netns, none or auto.")
@click.option("--metrics", metavar="HOST:PORT", help="Address of counters for Prometheus.")
@click.pass_context
def node(
    context: click.Context,
    config_file: Path | None,
    gateway: str | None,
    data: str | None,
    node_id: str | None,
    listen: str | None,
    isolation: str | None,
    metrics: str | None,
) -> None:
    """Run a node: one BuildKit per project, attached to a gateway.

    With a command: list and revoke the nodes of the gateway on this machine.

    \b
    Example:
      OFFLOAD_NODE_TOKEN=ofl_... offload-builder node --gateway gateway.example:7443
    """
    if context.invoked_subcommand is not None:
        return
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.privileges import give_up_privileges
    from offload_builder.node.server import NodeServer
    from offload_core.config import load
    from offload_core.logs import configure_logs

    config = load(
        NodeConfig,
        file=config_file,
        environment=os.environ,
        prefix="OFFLOAD_NODE",
        options={
            "gateway": gateway,
            "data": data,
            "node_id": node_id,
            "listen": listen,
            "isolation": isolation,
            "metrics_address": metrics,
        },
    )
    configure_logs(config.log_level)
    give_up_privileges(config.data)

    async def serve() -> None:
        async with NodeServer(config) as server:
            await server.run()

    asyncio.run(run_until_signal(serve()))


@node.command("list")
@gateway_options
@format_option
def list_nodes(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """List the nodes that were enrolled at the gateway on this machine, newest first."""
    config = load_gateway_config(config_file, data_dir=data_dir)

    async def read() -> list[Enrolment]:
        async with gateway_members(config) as members:
            return await members.enrolments.all()

    rows = [_row(enrolment) for enrolment in asyncio.run(read())]
    columns = ("node", "enrolment", "token", "state", "created_at", "renewed_at", "expires_at")
    print_records(rows, output_format, columns)


@node.command("revoke")
@gateway_options
@click.argument("node_id")
def revoke(node_id: str, config_file: Path | None, data_dir: str | None) -> None:
    """Refuse a node of the gateway on this machine from now on.

    The token that enrolled it stays as it is; so do its other nodes.
    """
    from offload_builder.gateway.audit import Event

    config = load_gateway_config(config_file, data_dir=data_dir)

    async def work() -> list[str]:
        async with gateway_records(config) as (members, audit):
            found = await members.enrolments.revoke_node(node_id)
            await audit.write(Event("node.revoked", **operator(), detail=f"node {node_id}"))
            return found

    for enrolment_id in asyncio.run(work()):
        print(enrolment_id)


def _row(enrolment: Enrolment) -> dict[str, object]:
    state = "valid"
    if enrolment.revoked_at is not None:
        state = "revoked"
    elif enrolment.expires_at <= datetime.now(UTC):
        state = "expired"
    return {
        "node": enrolment.node_id,
        "enrolment": enrolment.enrolment_id,
        "token": enrolment.token_id,
        "state": state,
        "created_at": enrolment.created_at,
        "renewed_at": enrolment.renewed_at,
        "expires_at": enrolment.expires_at,
        "last_used_at": enrolment.last_used_at,
        "revoked_at": enrolment.revoked_at,
    }

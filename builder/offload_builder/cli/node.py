"""`offload-builder node`: one node of the pool."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click

from offload_builder.cli.running import run_until_signal


@click.command()
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
def node(
    config_file: Path | None,
    gateway: str | None,
    data: str | None,
    node_id: str | None,
    listen: str | None,
) -> None:
    """Run a node: one BuildKit per project, attached to a gateway.

    \b
    Example:
      OFFLOAD_NODE_TOKEN=ofl_... offload-builder node --gateway gateway.example:7443
    """
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.server import NodeServer
    from offload_core.config import load
    from offload_core.logs import configure_logs

    config = load(
        NodeConfig,
        file=config_file,
        environment=os.environ,
        prefix="OFFLOAD_NODE",
        options={"gateway": gateway, "data": data, "node_id": node_id, "listen": listen},
    )
    configure_logs(config.log_level)

    async def serve() -> None:
        async with NodeServer(config) as server:
            await server.run()

    asyncio.run(run_until_signal(serve()))

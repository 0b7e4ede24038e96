"""`offload-builder gateway`: run the control plane."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import gateway_options, load_gateway_config
from offload_core.logs import configure_logs

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig


@click.command("gateway")
@gateway_options
@click.option("--listen", metavar="HOST:PORT", help="Address of the one public port.")
@click.option("--public-address", metavar="HOST:PORT", help="Address that clients dial.")
@click.option("--database-url", help="SQLAlchemy URL; SQLite in the data directory by default.")
@click.option("--metrics", metavar="HOST:PORT", help="Address of counters for Prometheus.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
def gateway(
    config_file: Path | None,
    data_dir: str | None,
    listen: str | None,
    public_address: str | None,
    database_url: str | None,
    metrics: str | None,
    log_level: str | None,
) -> None:
    """Run the gateway until it is told to stop.

    Example: offload-builder gateway --data-dir /var/lib/offload/gateway --listen 0.0.0.0:7443

    The first start prints the administrator's token on standard output, once. Everything can also
    be set in a TOML file or as OFFLOAD_GATEWAY_* variables.
    """
    config = load_gateway_config(
        config_file,
        data_dir=data_dir,
        listen=listen,
        public_address=public_address,
        database_url=database_url,
        metrics_address=metrics,
        log_level=log_level,
    )
    configure_logs(config.log_level)
    asyncio.run(serve(config))


async def serve(config: GatewayConfig) -> None:
    """Run a gateway until SIGINT or SIGTERM."""
    from offload_builder.gateway.app import Gateway

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Gateway(config) as running:
        token = running.take_first_token()
        if token is not None:
            print(token, flush=True)
            print(
                "This is the administrator's token; it is not shown again. "
                f"Log in with: offload login https://{running.address}",
                file=sys.stderr,
            )
        await stop.wait()


def register(group: click.Group) -> None:
    """Add the command to a group."""
    group.add_command(gateway)

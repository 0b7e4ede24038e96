"""`offload-builder audit`: who did what, on the gateway's machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import (
    gateway_options,
    gateway_records,
    load_gateway_config,
)
from offload_builder.cli.since import parse_since
from offload_builder.cli.tables import format_option

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.audit import AuditRecord, Query
    from offload_builder.gateway.config import GatewayConfig

POLL_SECONDS = 1.0


@click.command("audit")
@gateway_options
@click.option("--since", metavar="TIME", help="From when on: 2h, 7d, or 2026-01-31T12:00.")
@click.option("--member", default="", help="What one member, pipeline, node or operator did.")
@click.option("--project", "project_id", default="", help="What concerns one project.")
@click.option(
    "--action", default="", help='One kind, or all of a family: "token", "build.created".'
)
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=1000,
    show_default=True,
    help="Show the newest ones only.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@format_option
def audit(
    since: str | None,
    member: str,
    project_id: str,
    action: str,
    limit: int,
    follow: bool,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Show the audit log, oldest first; with --format json one JSON object a line.

    \b
    Examples:
      offload-builder audit --since 1h --action login
      offload-builder audit --member ann --project shop --format json -f
    """
    from offload_builder.gateway.audit import Query

    config = load_gateway_config(config_file, data_dir=data_dir)
    query = Query(
        since=parse_since(since), member=member, project_id=project_id, action=action, limit=limit
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_show(config, query, follow=follow, as_json=output_format == "json"))


async def _show(config: GatewayConfig, query: Query, *, follow: bool, as_json: bool) -> None:
    async with gateway_records(config) as (_, log):
        while True:
            for record in await log.read(query):
                query = replace(query, after=record.number)
                print(_json(record) if as_json else _line(record), flush=follow)
            if not follow:
                return
            await asyncio.sleep(POLL_SECONDS)


def _json(record: AuditRecord) -> str:
    values = asdict(record)
    values["at"] = record.at.isoformat(timespec="milliseconds")
    return json.dumps(values)


def _line(record: AuditRecord) -> str:
    who = record.member or "-"
    if record.role:
        who += f" ({record.role})"
    parts = [
        record.at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        f"{record.action:<16}",
        f"{record.result:<16}",
        who,
        record.address or "-",
    ]
    named = {
        "token": record.token_id,
        "project": record.project_id,
        "build": record.build_id,
        "secrets": ",".join(record.secret_ids),
    }
    parts += [f"{name}={value}" for name, value in named.items() if value]
    return "  ".join([*parts, record.detail]).rstrip()

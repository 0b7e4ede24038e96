"""`offload-builder session`: look at sessions and end them, on the gateway's machine."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import (
    gateway_options,
    gateway_sessions,
    load_gateway_config,
    operator,
)
from offload_builder.cli.since import parse_since
from offload_builder.cli.tables import format_option, print_records

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.sessions.table import SessionQuery, SessionRecord
    from offload_builder.gateway.sessions.usage import MemberUsage

COLUMNS = ("session_id", "name", "project_id", "owner", "state", "node_id", "created_at", "used")
USAGE_COLUMNS = ("member", "sessions", "used", "cost")
MICROS = 1_000_000


@click.group("session")
def session() -> None:
    """Look at the sessions of members, and end them."""


@session.command("ls")
@gateway_options
@click.option("--project", "project_id", default="", help="Those of one project only.")
@click.option("--member", default="", help="Those that one member may use only.")
@click.option("-a", "--all", "ended", is_flag=True, help="Ended ones too.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=100,
    show_default=True,
    help="Show the newest ones only.",
)
@format_option
def list_sessions(
    project_id: str,
    member: str,
    ended: bool,
    limit: int,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """List sessions, newest first; times in use are at most some seconds old.

    Example: offload-builder session ls --project shop --all
    """
    from offload_builder.gateway.sessions.table import SessionQuery

    config = load_gateway_config(config_file, data_dir=data_dir)
    query = SessionQuery(
        project_ids=(project_id,) if project_id else (),
        member=member,
        open_only=not ended,
        limit=limit,
    )
    records = asyncio.run(_list(config, query))
    rows = [_row(record, for_people=output_format == "table") for record in records]
    print_records(rows, output_format, COLUMNS)


@session.command("stop")
@gateway_options
@click.argument("session_id")
def stop(session_id: str, config_file: Path | None, data_dir: str | None) -> None:
    """End a session with everything in it; the gateway does it within seconds.

    Where its node is away, it is done when the node is back.

    Example: offload-builder session stop 3f9a0c11d2e4b567
    """
    config = load_gateway_config(config_file, data_dir=data_dir)
    print(asyncio.run(_stop(config, session_id)).session_id)


@session.command("usage")
@gateway_options
@click.argument("project_id")
@click.option(
    "--since", metavar="TIME", help="From when on: 12h, 7d, 2026-01-31; 30 days by default."
)
@format_option
def usage(
    project_id: str,
    since: str | None,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Sum up time and cost of a project's sessions by member.

    Sessions that were open at some time since then count whole.

    Example: offload-builder session usage shop --since 7d
    """
    config = load_gateway_config(config_file, data_dir=data_dir)
    start = parse_since(since) or datetime.now(UTC) - timedelta(days=30)
    found = asyncio.run(_usage(config, project_id, start))
    for_people = output_format == "table"
    print_records(
        [_usage_row(item, for_people=for_people) for item in found], output_format, USAGE_COLUMNS
    )


def register(group: click.Group) -> None:
    """Add the commands to a group."""
    group.add_command(session)


async def _list(config: GatewayConfig, query: SessionQuery) -> list[SessionRecord]:
    async with gateway_sessions(config) as (_, table, _):
        return await table.page(query)


async def _stop(config: GatewayConfig, session_id: str) -> SessionRecord:
    from offload_builder.gateway.audit import Event
    from offload_core.errors import NotFoundError

    who = operator()
    async with gateway_sessions(config) as (_, table, audit):
        record = await table.mark_stopped(session_id, f"stopped by the operator {who['member']}")
        if record is None:
            raise NotFoundError(
                f"there is no session {session_id[:40]!a}",
                hint="list them with: offload-builder session ls",
            )
        detail = f"{record.session_id} {record.name} of {record.owner}"
        event = Event("session.stopped", **who, project_id=record.project_id, detail=detail)
        await audit.write(event)
        return record


async def _usage(config: GatewayConfig, project_id: str, since: datetime) -> Sequence[MemberUsage]:
    from offload_builder.gateway.sessions.table import SessionTotal
    from offload_builder.gateway.sessions.usage import sum_up

    async with gateway_sessions(config) as (members, table, _):
        await members.project(project_id)
        totals, still = await table.used_since(project_id, since)
        totals += [SessionTotal.of(record, record.used_milliseconds) for record in still]
        return sum_up(totals, config.cost_currency)


def _row(record: SessionRecord, *, for_people: bool) -> dict[str, object]:
    from offload_builder.gateway.sessions.cost import amount
    from offload_builder.gateway.sessions.table import state_name
    from offload_core.units import format_duration

    row: dict[str, object] = {
        "session_id": record.session_id,
        "name": record.name,
        "project_id": record.project_id,
        "owner": record.owner,
        "shared_with": list(record.shared_with),
        "state": state_name(record.state),
        "reason": record.stop_reason or record.reason,
        "node_id": record.node_id,
        "devices": list(record.devices),
        "engine_version": record.engine_version,
        "created_at": record.created_at,
        "ready_at": record.ready_at,
        "ended_at": record.ended_at,
        "used_seconds": record.used_milliseconds / 1000,
        "cost_micros": amount(record.used_milliseconds, record.micros_per_hour),
        "currency": record.currency,
    }
    if for_people:
        row["used"] = format_duration(record.used_milliseconds / 1000)
    return row


def _usage_row(item: MemberUsage, *, for_people: bool) -> dict[str, object]:
    from offload_core.units import format_duration

    row: dict[str, object] = {"member": item.member, "sessions": item.sessions}
    if for_people:
        cost = f"{item.micros / MICROS:.2f} {item.currency}" if item.currency else None
        return row | {"used": format_duration(item.used_milliseconds / 1000), "cost": cost}
    return row | {
        "used_seconds": item.used_milliseconds / 1000,
        "cost_micros": item.micros,
        "currency": item.currency,
    }

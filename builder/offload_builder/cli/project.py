"""`offload-builder project`: make, bound and list projects on the gateway's machine."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

import click

from offload_builder.cli.configuration import (
    gateway_options,
    gateway_projects,
    gateway_records,
    load_gateway_config,
    operator,
)
from offload_builder.cli.tables import format_option, print_record, print_records
from offload_core.errors import UsageError
from offload_core.units import format_duration, format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import ProjectRecord

DEFAULT = "default"
BOUND_COLUMNS = ("cache_keep", "cache_idle", "node_cache_keep")


@click.group("project")
def project() -> None:
    """Make, bound and list projects, the units of cache sharing."""


@project.command("create")
@gateway_options
@click.argument("project_id")
def create(project_id: str, config_file: Path | None, data_dir: str | None) -> None:
    """Make a project.

    Example: offload-builder project create shop
    """
    config = load_gateway_config(config_file, data_dir=data_dir)
    print(asyncio.run(_create(config, project_id)).project_id)


@project.command("list")
@gateway_options
@format_option
def list_projects(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """List projects by name, with the bounds that they have of their own."""
    config = load_gateway_config(config_file, data_dir=data_dir)
    rows = asyncio.run(_list(config))
    if output_format == "table":
        rows = [{**row, **_bounds_for_people(row)} for row in rows]
    print_records(rows, output_format, ("project_id", "created_at", *BOUND_COLUMNS))


@project.command("set")
@gateway_options
@click.argument("project_id")
@click.option(
    "--cache-keep", metavar="SIZE", help="Bytes to keep in the shared store, for example 100GB."
)
@click.option(
    "--cache-idle",
    metavar="TIME",
    help="Remove entries of the shared store that were of no use to any build for so long.",
)
@click.option("--node-cache-keep", metavar="SIZE", help="Bytes to keep on the disk of each node.")
def set_bounds(
    project_id: str,
    cache_keep: str | None,
    cache_idle: str | None,
    node_cache_keep: str | None,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Bound the layer cache of a project; nodes hear of it within ten seconds.

    Bounds that are not named stay as they are. "default" leaves one to the configuration of the
    nodes again.

    \b
    Examples:
      offload-builder project set shop --cache-keep 100GB --cache-idle 14d
      offload-builder project set shop --node-cache-keep default
    """
    bounds: dict[str, int] = {}
    if cache_keep is not None:
        bounds["shared_keep_bytes"] = _bound("--cache-keep", cache_keep, parse_size)
    if cache_idle is not None:
        bounds["shared_idle_seconds"] = _bound("--cache-idle", cache_idle, parse_duration)
    if node_cache_keep is not None:
        bounds["node_keep_bytes"] = _bound("--node-cache-keep", node_cache_keep, parse_size)
    if not bounds:
        raise UsageError("name a bound to set: --cache-keep, --cache-idle or --node-cache-keep")
    config = load_gateway_config(config_file, data_dir=data_dir)
    print_record(asyncio.run(_set(config, project_id, bounds)))


def register(group: click.Group) -> None:
    """Add the commands to a group."""
    group.add_command(project)


async def _create(config: GatewayConfig, project_id: str) -> ProjectRecord:
    from offload_builder.gateway.audit import Event

    async with gateway_records(config) as (members, audit):
        record = await members.create_project(project_id)
        await audit.write(Event("project.created", **operator(), project_id=project_id))
        return record


async def _list(config: GatewayConfig) -> list[dict[str, object]]:
    from offload_builder.gateway.projectbounds import ProjectBounds

    async with gateway_projects(config) as (members, table):
        records = await members.list_projects()
        bounds = await table.all()
    return [
        dataclasses.asdict(record)
        | dataclasses.asdict(bounds.get(record.project_id, ProjectBounds(record.project_id)))
        for record in records
    ]


async def _set(config: GatewayConfig, project_id: str, bounds: dict[str, int]) -> dict[str, object]:
    async with gateway_projects(config) as (members, table):
        await members.project(project_id)
        return dataclasses.asdict(await table.change(project_id, **bounds))


def _bound(option: str, text: str, parse: Callable[[str], float]) -> int:
    if text == DEFAULT:
        return 0
    value = int(parse(text))
    if value <= 0:
        raise UsageError(f'{option} must be greater than 0; "{DEFAULT}" removes the bound')
    return value


def _bounds_for_people(row: Mapping[str, Any]) -> dict[str, str]:
    sizes = {name: row[name] for name in ("shared_keep_bytes", "node_keep_bytes")}
    shown = {name: format_size(size) if size else DEFAULT for name, size in sizes.items()}
    idle = row["shared_idle_seconds"]
    days, rest = divmod(idle, 86_400)
    text = f"{days}d" if days and not rest else format_duration(idle)
    return {
        "cache_keep": shown["shared_keep_bytes"],
        "cache_idle": text if idle else DEFAULT,
        "node_cache_keep": shown["node_keep_bytes"],
    }

"""`offload-builder project`: make and list projects on the gateway's machine."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import (
    gateway_members,
    gateway_options,
    load_gateway_config,
)
from offload_builder.cli.tables import format_option, print_records

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.members import ProjectRecord


@click.group("project")
def project() -> None:
    """Make and list projects, the units of cache sharing."""


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
    """List projects by name."""
    config = load_gateway_config(config_file, data_dir=data_dir)
    records = asyncio.run(_list(config))
    rows = [dataclasses.asdict(record) for record in records]
    print_records(rows, output_format, ("project_id", "created_at"))


def register(group: click.Group) -> None:
    """Add the commands to a group."""
    group.add_command(project)


async def _create(config: GatewayConfig, project_id: str) -> ProjectRecord:
    async with gateway_members(config) as members:
        return await members.create_project(project_id)


async def _list(config: GatewayConfig) -> list[ProjectRecord]:
    async with gateway_members(config) as members:
        return await members.list_projects()

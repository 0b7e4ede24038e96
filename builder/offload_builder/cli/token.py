"""`offload-builder token`: make, list and revoke tokens on the gateway's machine."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from offload_builder.cli.configuration import (
    gateway_members,
    gateway_options,
    load_gateway_config,
)
from offload_builder.cli.tables import format_option, print_record, print_records

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.tokens import TokenRecord, TokenText

ROLES = ("admin", "member", "ci", "untrusted", "node")


@click.group("token")
def token() -> None:
    """Make, list and revoke access tokens."""


@token.command("create")
@gateway_options
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="member", show_default=True)
@click.option("--project", "projects", multiple=True, help="Project it opens; all by default.")
@click.option("--expires-in", metavar="DURATION", help="End, for example 90d; never by default.")
@format_option
def create(
    name: str,
    role: str,
    projects: tuple[str, ...],
    expires_in: str | None,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Make a token and print it, once, on standard output.

    Example: offload-builder token create --role node pool-1
    """
    from offload_core.units import parse_duration

    config = load_gateway_config(config_file, data_dir=data_dir)
    expires_at = None
    if expires_in is not None:
        expires_at = datetime.now(UTC) + timedelta(seconds=parse_duration(expires_in))
    record, text = asyncio.run(_create(config, name, role, projects, expires_at))
    if output_format == "json":
        print_record(_row(record) | {"token": text.reveal()})
        return
    print(text.reveal())
    print("This token is not shown again.", file=sys.stderr)


@token.command("list")
@gateway_options
@format_option
def list_tokens(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """List tokens, newest first, without their secrets."""
    config = load_gateway_config(config_file, data_dir=data_dir)
    records = asyncio.run(_list(config))
    columns = ("token_id", "name", "role", "projects", "state", "created_at", "last_used_at")
    print_records([_row(record) for record in records], output_format, columns)


@token.command("revoke")
@gateway_options
@click.argument("token_id")
def revoke(token_id: str, config_file: Path | None, data_dir: str | None) -> None:
    """End a token and every certificate made from it."""
    config = load_gateway_config(config_file, data_dir=data_dir)
    record = asyncio.run(_revoke(config, token_id))
    print(record.token_id)


def register(group: click.Group) -> None:
    """Add the commands to a group."""
    group.add_command(token)


async def _create(
    config: GatewayConfig,
    name: str,
    role: str,
    projects: tuple[str, ...],
    expires_at: datetime | None,
) -> tuple[TokenRecord, TokenText]:
    from offload_builder.gateway.tokens import role_from_name

    async with gateway_members(config) as members:
        return await members.create_token(
            name=name, role=role_from_name(role), project_ids=projects, expires_at=expires_at
        )


async def _list(config: GatewayConfig) -> list[TokenRecord]:
    async with gateway_members(config) as members:
        return await members.list_tokens()


async def _revoke(config: GatewayConfig, token_id: str) -> TokenRecord:
    async with gateway_members(config) as members:
        return await members.revoke_token(token_id)


def _row(record: TokenRecord) -> dict[str, object]:
    from offload_builder.gateway.tokens import role_name

    state = "valid"
    if record.revoked_at is not None:
        state = "revoked"
    elif record.expires_at is not None and record.expires_at <= datetime.now(UTC):
        state = "expired"
    return {
        "token_id": record.token_id,
        "name": record.name,
        "role": role_name(record.role),
        "projects": list(record.project_ids),
        "state": state,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "last_used_at": record.last_used_at,
        "revoked_at": record.revoked_at,
    }

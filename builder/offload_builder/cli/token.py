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
    gateway_records,
    load_gateway_config,
    operator,
)
from offload_builder.cli.tables import format_option, print_record, print_records

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.tokens import TokenRecord, TokenText

NODE_ENROLMENT_LIFE = "1d"
"""It is used at once; what lies about later is worth nothing."""
ROLES = ("admin", "member", "ci", "untrusted", "node")


@click.group("token")
def token() -> None:
    """Make, list and revoke access tokens."""


@token.command("create")
@gateway_options
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="member", show_default=True)
@click.option("--project", "projects", multiple=True, help="Project it opens; all by default.")
@click.option(
    "--expires-in",
    metavar="DURATION",
    help="End, for example 90d, or never. By default never; 1d for a node's token, which ends its "
    "use, not the nodes that it enrolled.",
)
@click.option(
    "--uses",
    type=click.IntRange(0, 10_000),
    help="How many nodes it may enrol, 0 for any number; 1 by default. For --role node.",
)
@format_option
def create(
    name: str,
    role: str,
    projects: tuple[str, ...],
    expires_in: str | None,
    uses: int | None,
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
    if expires_in is None and role == "node":
        expires_in = NODE_ENROLMENT_LIFE
    if expires_in not in (None, "never"):
        expires_at = datetime.now(UTC) + timedelta(seconds=parse_duration(expires_in or ""))
    record, text = asyncio.run(_create(config, name, role, projects, expires_at, uses))
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
    records, uses = asyncio.run(_list(config))
    columns = ("token_id", "name", "role", "projects", "state", "created_at", "last_used_at")
    rows = [_row(record, uses.get(record.token_id, 0)) for record in records]
    print_records(rows, output_format, columns)


@token.command("revoke")
@gateway_options
@click.argument("token_id")
def revoke(token_id: str, config_file: Path | None, data_dir: str | None) -> None:
    """End a token and every certificate made from it, within seconds, at all nodes.

    Also a login by an identity provider, or the enrolment of one node, by its id. Builds of the
    token are cancelled.
    """
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
    uses: int | None,
) -> tuple[TokenRecord, TokenText]:
    from offload_builder.gateway.audit import Event
    from offload_builder.gateway.tokens import role_from_name

    async with gateway_records(config) as (members, audit):
        record, text = await members.create_token(
            name=name,
            role=role_from_name(role),
            project_ids=projects,
            expires_at=expires_at,
            max_uses=uses,
        )
        scope = ", ".join(record.project_ids) or "all projects"
        detail = f"{record.token_id} {name} {role} for {scope}"
        await audit.write(Event("token.created", **operator(), detail=detail))
        return record, text


async def _list(config: GatewayConfig) -> tuple[list[TokenRecord], dict[str, int]]:
    async with gateway_members(config) as members:
        return await members.list_tokens(), await members.enrolments.uses()


async def _revoke(config: GatewayConfig, token_id: str) -> TokenRecord:
    from offload_builder.gateway.audit import Event

    async with gateway_records(config) as (members, audit):
        record = await members.revoke_token(token_id)
        detail = f"{record.token_id} {record.name}"
        await audit.write(Event("token.revoked", **operator(), detail=detail))
        return record


def _row(record: TokenRecord, uses: int = 0) -> dict[str, object]:
    from offload_builder.gateway.tokens import role_name

    state = "valid"
    if record.revoked_at is not None:
        state = "revoked"
    elif record.expires_at is not None and record.expires_at <= datetime.now(UTC):
        state = "expired"
    elif record.max_uses is not None and uses >= record.max_uses:
        state = "used"
    return {
        "token_id": record.token_id,
        "name": record.name,
        "role": role_name(record.role),
        "projects": list(record.project_ids),
        "state": state,
        "max_uses": record.max_uses,
        "uses": uses,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "last_used_at": record.last_used_at,
        "revoked_at": record.revoked_at,
    }

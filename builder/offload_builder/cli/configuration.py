"""The options that all commands about a gateway share."""

from __future__ import annotations

import os
import pwd
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from offload_core.config import load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from offload_builder.gateway.audit import AuditLog
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.egresspolicies import EgressPolicies
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.projectbounds import BoundsTable
    from offload_builder.gateway.sessions.table import SessionsTable
    from offload_builder.gateway.store import Store

F = TypeVar("F", bound="Callable[..., Any]")


class Operator(TypedDict):
    """Fields of a record of the audit log that say who did something."""

    member: str
    role: str
    address: str


ENVIRONMENT_PREFIX = "OFFLOAD_GATEWAY"


def gateway_options(function: F) -> F:
    """Add --config and --data-dir."""
    config = click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar=f"{ENVIRONMENT_PREFIX}_CONFIG",
        help="TOML file of the gateway.",
    )
    data_dir = click.option(
        "--data-dir",
        type=click.Path(file_okay=False),
        help="Directory of the gateway's keys and database.",
    )
    return config(data_dir(function))


def load_gateway_config(config_file: Path | None, **options: Any) -> GatewayConfig:
    """Return the configuration: option > OFFLOAD_GATEWAY_* > file > default.

    Raises:
        ConfigError: with source, key and what is allowed.
    """
    from offload_builder.gateway.config import GatewayConfig

    own = f"{ENVIRONMENT_PREFIX}_CONFIG"
    environment = {key: value for key, value in os.environ.items() if key != own}
    return load(
        GatewayConfig,
        file=config_file,
        environment=environment,
        prefix=ENVIRONMENT_PREFIX,
        options=options,
    )


@asynccontextmanager
async def gateway_members(config: GatewayConfig) -> AsyncIterator[Members]:
    """Open a gateway's data beside the gateway, which may run at the same time.

    Raises:
        ConfigError: it cannot be opened.
    """
    async with gateway_projects(config) as (members, _):
        yield members


@asynccontextmanager
async def gateway_projects(config: GatewayConfig) -> AsyncIterator[tuple[Members, BoundsTable]]:
    """Do as `gateway_members`, with the bounds of projects.

    Raises:
        ConfigError: it cannot be opened.
    """
    from offload_builder.gateway.app import open_members
    from offload_builder.gateway.projectbounds import BoundsTable

    async with AsyncExitStack() as stack:
        _, store, members = await open_members(config, stack)
        yield members, BoundsTable(store)


@asynccontextmanager
async def gateway_records(config: GatewayConfig) -> AsyncIterator[tuple[Members, AuditLog]]:
    """Do as `gateway_members`, with the audit log, for commands that change something.

    Raises:
        ConfigError: it cannot be opened.
    """
    from offload_builder.gateway.app import open_members
    from offload_builder.gateway.audit import AuditLog

    async with AsyncExitStack() as stack:
        _, store, members = await open_members(config, stack)
        yield members, AuditLog(store)


@asynccontextmanager
async def gateway_policies(
    config: GatewayConfig,
) -> AsyncIterator[tuple[Members, EgressPolicies, AuditLog]]:
    """Do as `gateway_records`, with the egress policies.

    Raises:
        ConfigError: it cannot be opened.
    """
    from offload_builder.gateway.app import open_members
    from offload_builder.gateway.audit import AuditLog
    from offload_builder.gateway.egresspolicies import EgressPolicies

    async with AsyncExitStack() as stack:
        _, store, members = await open_members(config, stack)
        yield members, EgressPolicies(store), AuditLog(store)


@asynccontextmanager
async def gateway_sessions(
    config: GatewayConfig,
) -> AsyncIterator[tuple[Members, SessionsTable, AuditLog]]:
    """Do as `gateway_records`, with the sessions.

    Raises:
        ConfigError: it cannot be opened.
    """
    from offload_builder.gateway.app import open_members
    from offload_builder.gateway.audit import AuditLog
    from offload_builder.gateway.sessions.table import SessionsTable

    async with AsyncExitStack() as stack:
        _, store, members = await open_members(config, stack)
        yield members, SessionsTable(store), AuditLog(store)


@asynccontextmanager
async def gateway_store(config: GatewayConfig) -> AsyncIterator[Store]:
    """Open a gateway's database beside the gateway.

    Raises:
        ConfigError: it cannot be opened.
    """
    from offload_builder.gateway.app import open_members

    async with AsyncExitStack() as stack:
        _, store, _ = await open_members(config, stack)
        yield store


def operator() -> Operator:
    """Return who uses this command, for the audit log."""
    from offload_builder.gateway.audit import OPERATOR

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    return {"member": name, "role": OPERATOR, "address": "local"}

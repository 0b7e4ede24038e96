"""`offload-builder policy nodes`, and what `policy apply` says of the nodes."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import click

from offload_builder.cli.configuration import gateway_options, gateway_store, load_gateway_config
from offload_builder.cli.tables import format_option, print_records

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.egressnodes import NodePolicies

F = TypeVar("F", bound="Callable[..., Any]")

WAIT = "5s"
NO_GATEWAY = "no gateway runs here, so the nodes follow when it does"


def wait_option(function: F) -> F:
    """Add --wait."""
    return click.option(
        "--wait",
        metavar="DURATION",
        default=WAIT,
        callback=lambda _context, _parameter, value: _seconds(value),
        show_default=True,
        help="Wait so long for the nodes to put it in force; 0 for not at all.",
    )(function)


@click.command("nodes")
@gateway_options
@format_option
def nodes(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """List the attached nodes with the versions of the policies that they have in force.

    \b
    Examples:
      offload-builder policy nodes
      offload-builder policy nodes --format json
    """
    config = load_gateway_config(config_file, data_dir=data_dir)
    found = asyncio.run(read_nodes(config))
    if found is None:
        print("no gateway runs here, so nothing is known of the nodes", file=sys.stderr)
    rows = [
        {
            "node": item.node_id,
            "pool": item.versions.get("", 0),
            "projects": _projects(item) if output_format == "table" else _own(item),
            "problem": item.problem,
        }
        for item in found or ()
    ]
    print_records(rows, output_format, ("node", "pool", "projects", "problem"))


async def read_nodes(config: GatewayConfig) -> list[NodePolicies] | None:
    """Return what the attached nodes have in force; None where no gateway runs."""
    from offload_builder.gateway.egressnodes import EgressNodes

    async with gateway_store(config) as store:
        return await EgressNodes(store).read()


async def wait_for_nodes(
    config: GatewayConfig, scope: str, version: int, wait: float
) -> list[NodePolicies] | None:
    """Wait until a version is in force at all nodes; see `EgressNodes.wait`.

    Args:
        config: of the gateway.
        scope: whose policy; empty for the pool.
        version: of it.
        wait: how many seconds at most.
    """
    from offload_builder.gateway.egressnodes import EgressNodes

    async with gateway_store(config) as store:
        return await EgressNodes(store).wait(scope, version, wait)


def in_force(found: Sequence[NodePolicies], scope: str, version: int) -> str:
    """Return at how many nodes a version is in force, for people."""
    holding = sum(item.holds(scope, version) for item in found)
    return f"{holding} of {len(found)}"


def print_outcome(found: list[NodePolicies] | None, scope: str, version: int) -> None:
    """Say where a version is in force, and why not elsewhere."""
    if found is None:
        print(NO_GATEWAY, file=sys.stderr)
        return
    if not found:
        print("No node is attached; those that come have it from the beginning")
        return
    print(f"In force at {in_force(found, scope, version)} nodes")
    for item in found:
        if why := item.why_not(scope, version):
            print(f"Not at {item.node_id}: {why}", file=sys.stderr)


def outcome_record(
    found: list[NodePolicies] | None, scope: str, version: int
) -> list[dict[str, object]] | None:
    """Return the same for programs; None where no gateway runs."""
    if found is None:
        return None
    return [
        {
            "node": item.node_id,
            "in_force": item.holds(scope, version),
            "version": item.versions.get(scope, 0),
            "problem": item.why_not(scope, version),
        }
        for item in found
    ]


def _seconds(text: str) -> float:
    from offload_core.units import parse_duration

    return parse_duration(text)


def _own(item: NodePolicies) -> dict[str, int]:
    return {scope: version for scope, version in sorted(item.versions.items()) if scope}


def _projects(item: NodePolicies) -> str:
    return ", ".join(f"{scope} {version}" for scope, version in _own(item).items()) or "-"

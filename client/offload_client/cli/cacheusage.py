"""`offload cache usage`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.tables import ago, format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.units import format_duration, format_size
from offload_proto.v1.cache_service_pb2 import UsageRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.cache_service_pb2 import CacheGain, NodeUsage, ProjectUsage, ScopeUsage

USAGE_SECONDS = 60.0


@click.command()
@click.option("--project", metavar="NAME", help="Only this project; all that you may use if not.")
@gateway_option
@click.option(
    "--format", "output", type=click.Choice(("table", "json")), default="table", show_default=True
)
@click.pass_obj
def usage(invocation: Invocation, project: str | None, gateway: str | None, output: str) -> int:
    """Show what the layer cache takes, and what it brought.

    By project: bytes in the shared store, hit rate and saved time of the last days. By scope:
    entries, bytes of all their layers, bytes that no other scope has, age. By node: its disk.

    \b
    Examples:
      offload cache usage
      offload cache usage --project shop --format json
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = UsageRequest(project_id=project or "")
        reply = await calls.call(calls.cache.Usage, request, timeout=USAGE_SECONDS)
        for item in reply.projects:
            for warning in _warnings(item):
                invocation.err(f"WARNING: {item.project_id}: {warning}")
        if output == "json":
            invocation.out(json.dumps([usage_json(item) for item in reply.projects], indent=2))
        else:
            invocation.out(usage_tables(reply.projects))

    return run_async(invocation, run)


def _warnings(item: ProjectUsage) -> list[str]:
    found = []
    if item.usage.shared_problem:
        found.append(item.usage.shared_problem)
    if item.silent_node_ids:
        found.append(f"no answer from {', '.join(item.silent_node_ids)}")
    return found


def usage_tables(projects: Sequence[ProjectUsage]) -> str:
    """Return three tables: projects, their scopes, and the disks of their nodes."""
    parts = [format_table(_PROJECT_HEADINGS, [_project_row(item) for item in projects])]
    scopes = [
        _scope_row(item.project_id, scope) for item in projects for scope in item.usage.scopes
    ]
    if scopes:
        parts.append(format_table(_SCOPE_HEADINGS, scopes))
    nodes = [_node_row(item.project_id, node) for item in projects for node in item.usage.nodes]
    if nodes:
        parts.append(format_table(_NODE_HEADINGS, nodes))
    return "\n\n".join(parts)


_PROJECT_HEADINGS = (
    "PROJECT", "BUILDS", "HIT RATE", "SAVED", "SHARED", "BOUND", "GARBAGE", "COLLECTED",
)  # fmt: skip
_SCOPE_HEADINGS = (
    "PROJECT", "SCOPE", "ENTRIES", "SIZE", "UNIQUE SIZE", "WRITTEN", "USED", "BY",
)  # fmt: skip
_NODE_HEADINGS = ("PROJECT", "NODE", "LAYERS", "BUILDKIT", "CONTEXT", "UPLOADS")


def _project_row(item: ProjectUsage) -> tuple[str, ...]:
    found, gain = item.usage, item.gain
    return (
        item.project_id,
        str(gain.builds),
        f"{_hit_rate(gain):.0%}" if gain.steps_total else "-",
        format_duration(gain.saved.seconds + gain.saved.nanos / 1e9) if gain.builds else "-",
        format_size(found.shared_bytes),
        _bound(found.shared_keep_bytes),
        format_size(found.garbage_bytes),
        ago(found.collected_at),
    )


def _scope_row(project_id: str, scope: ScopeUsage) -> tuple[str, ...]:
    return (
        project_id,
        scope.scope,
        str(scope.entries),
        format_size(scope.layer_bytes),
        format_size(scope.own_bytes),
        ago(scope.written_at),
        ago(scope.used_at),
        scope.member or "-",
    )


def _node_row(project_id: str, node: NodeUsage) -> tuple[str, ...]:
    return (
        project_id,
        node.node_id,
        _of(node.blob_bytes, node.blob_keep_bytes),
        _of(node.buildkit_bytes, node.buildkit_keep_bytes),
        _of(node.context_bytes, node.context_keep_bytes),
        str(node.pending_uploads),
    )


def _hit_rate(gain: CacheGain) -> float:
    return gain.steps_cached / gain.steps_total if gain.steps_total else 0.0


def _bound(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes else "-"


def _of(size_bytes: int, bound_bytes: int) -> str:
    return f"{format_size(size_bytes)} of {_bound(bound_bytes)}"


def usage_json(item: ProjectUsage) -> dict[str, Any]:
    """Return one project for machines; field names are those of offload.v1.ProjectUsage."""
    found, gain = item.usage, item.gain
    return {
        "project_id": item.project_id,
        "shared_bytes": found.shared_bytes,
        "shared_objects": found.shared_objects,
        "garbage_bytes": found.garbage_bytes,
        "shared_keep_bytes": found.shared_keep_bytes,
        "collected_at": rfc3339(found.collected_at),
        "shared_problem": found.shared_problem,
        "silent_node_ids": list(item.silent_node_ids),
        "gain": {
            "period_seconds": gain.period.seconds,
            "builds": gain.builds,
            "steps_total": gain.steps_total,
            "steps_cached": gain.steps_cached,
            "hit_rate": round(_hit_rate(gain), 4),
            "saved_seconds": round(gain.saved.seconds + gain.saved.nanos / 1e9, 3),
        },
        "scopes": [
            {
                "scope": scope.scope,
                "entries": scope.entries,
                "layer_bytes": scope.layer_bytes,
                "own_bytes": scope.own_bytes,
                "written_at": rfc3339(scope.written_at),
                "used_at": rfc3339(scope.used_at),
                "member": scope.member,
                "build_id": scope.build_id,
            }
            for scope in found.scopes
        ],
        "nodes": [
            {
                "node_id": node.node_id,
                "blob_bytes": node.blob_bytes,
                "blob_keep_bytes": node.blob_keep_bytes,
                "buildkit_bytes": node.buildkit_bytes,
                "buildkit_keep_bytes": node.buildkit_keep_bytes,
                "context_bytes": node.context_bytes,
                "context_keep_bytes": node.context_keep_bytes,
                "pending_uploads": node.pending_uploads,
            }
            for node in found.nodes
        ],
    }

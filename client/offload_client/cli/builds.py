"""`offload builds`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.tables import ago, between, format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_core.units import format_duration, format_size
from offload_proto.v1.builds_service_pb2 import BuildState, CacheState, GetRequest, ListRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.builds_service_pb2 import Build, BuildStats
    from offload_proto.v1.identity_service_pb2 import ExternalIdentity


@click.command()
@click.argument("build_id", metavar="[BUILD]", required=False)
@click.option("--project", metavar="NAME", help="Only builds of this project.")
@click.option(
    "-n",
    "--limit",
    default=20,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="At most so many.",
)
@gateway_option
@click.option(
    "--format", "output", type=click.Choice(("table", "json")), default="table", show_default=True
)
@click.pass_obj
def builds(
    invocation: Invocation,
    build_id: str | None,
    project: str | None,
    limit: int,
    gateway: str | None,
    output: str,
) -> int:
    """List builds, newest first, or show one by its id or the beginning of it.

    \b
    Examples:
      offload builds
      offload builds 3f9a --format json
    """
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        if build_id:
            reply = await calls.call(calls.builds.Get, GetRequest(build_id=build_id))
            text = (
                _pretty(reply.build)
                if output == "table"
                else json.dumps(build_json(reply.build), indent=2)
            )
            invocation.out(text)
            return
        request = ListRequest(project_id=project or "", page_size=limit)
        found = (await calls.call(calls.builds.List, request)).builds
        if output == "json":
            invocation.out(json.dumps([build_json(build) for build in found], indent=2))
            return
        headings = (
            "BUILD ID",
            "NAME",
            "PROJECT",
            "MEMBER",
            "STATUS",
            "CACHED",
            "CREATED",
            "DURATION",
        )
        invocation.out(format_table(headings, [_row(build) for build in found]))

    return run_async(invocation, run)


def _state(build: Build) -> str:
    return BuildState.Name(build.state).removeprefix("BUILD_STATE_").lower()


def _status(build: Build) -> str:
    """Return the state, with the build that a lost one was repeated as, or the reverse."""
    text = _state(build)
    if build.repeated_by:
        text += f", repeated as {build.repeated_by}"
    elif build.repeat_of:
        text += f", repeat of {build.repeat_of}"
    return text


def _cache(build: Build) -> str:
    return CacheState.Name(build.cache_state).removeprefix("CACHE_STATE_").lower()


def _title(build: Build) -> str:
    """Return the name, of a part of an image with the platforms that make it one."""
    return f"{build.name} [{','.join(build.platforms)}]" if build.group_id else build.name


def _row(build: Build) -> tuple[str, ...]:
    return (
        build.build_id,
        _title(build),
        build.project_id,
        build.member,
        _status(build),
        f"{build.stats.steps_cached}/{build.stats.steps_total}",
        ago(build.created_at),
        between(build.started_at, build.completed_at),
    )


def _pretty(build: Build) -> str:
    stats = build.stats
    lines = {
        "Build": build.build_id,
        "Name": build.name,
        "Project": build.project_id,
        "Member": build.member,
        "Node": build.node_id or "-",
        "Repeat of": build.repeat_of or "-",
        "Repeated as": build.repeated_by or "-",
        "Status": _state(build) + (f": {build.error}" if build.error else ""),
        "Dockerfile": build.dockerfile_path,
        "Target": build.target or "-",
        "Platforms": ",".join(build.platforms) or "the node's own",
        "Revision": " ".join(filter(None, (build.vcs_branch, build.vcs_revision))) or "-",
        "Created": rfc3339(build.created_at) or "-",
        "Duration": between(build.started_at, build.completed_at),
        "Steps": _steps(stats),
        "Context": f"{stats.context_files} files, {format_size(stats.context_bytes)}, "
        f"{format_size(stats.context_sent_bytes)} sent",
        "Returned": format_size(stats.returned_bytes),
        "Image": (build.image_digest or "-") + (", saved" if build.image_saved else ""),
        "Cache": _cache(build),
    }
    if build.group_id:
        lines["Part of"] = f"group {build.group_id}: one image, whose platforms several nodes build"
    if build.HasField("identity"):
        lines["Identity"] = f"{build.identity.subject} ({build.identity.issuer})"
        lines["Rule"] = build.identity.rule
        lines["Run"] = build.identity.run_url or "-"
    width = max(map(len, lines)) + 3
    return "\n".join(f"{name.ljust(width)}{value}" for name, value in lines.items())


def identity_json(identity: ExternalIdentity) -> dict[str, Any]:
    """Return who somebody is at an identity provider; names are those of the API."""
    return {
        "issuer": identity.issuer,
        "subject": identity.subject,
        "run_url": identity.run_url,
        "rule": identity.rule,
        "bound": identity.bound,
        "branch": identity.branch,
        "target_branch": identity.target_branch,
        "pull_request": identity.pull_request,
        "fork": identity.fork,
        "protected_branch": identity.protected_branch,
    }


def _steps(stats: BuildStats) -> str:
    text = f"{stats.steps_total}, {stats.steps_cached} cached"
    if stats.saved_milliseconds:
        text += f", which saved {format_duration(stats.saved_milliseconds / 1000)}"
    return text


def build_json(build: Build) -> dict[str, Any]:
    """Return a build for machines; field names are those of offload.v1.Build."""
    stats = build.stats
    return {
        "build_id": build.build_id,
        "project_id": build.project_id,
        "member": build.member,
        "name": build.name,
        "state": _state(build),
        "node_id": build.node_id,
        "created_at": rfc3339(build.created_at),
        "started_at": rfc3339(build.started_at),
        "completed_at": rfc3339(build.completed_at),
        "error": build.error,
        "image_digest": build.image_digest,
        "cache_state": _cache(build),
        "dockerfile_path": build.dockerfile_path,
        "target": build.target,
        "platforms": list(build.platforms),
        "group_id": build.group_id,
        "vcs_branch": build.vcs_branch,
        "vcs_revision": build.vcs_revision,
        "repeat_of": build.repeat_of,
        "repeated_by": build.repeated_by,
        "image_saved": build.image_saved,
        "identity": identity_json(build.identity) if build.HasField("identity") else None,
        "client": build.client,
        "stats": {
            "steps_total": stats.steps_total,
            "steps_cached": stats.steps_cached,
            "context_files": stats.context_files,
            "context_bytes": stats.context_bytes,
            "context_sent_bytes": stats.context_sent_bytes,
            "context_wire_bytes": stats.context_wire_bytes,
            "context_shared_bytes": stats.context_shared_bytes,
            "context_refused_blobs": stats.context_refused_blobs,
            "returned_bytes": stats.returned_bytes,
            "warnings": stats.warnings,
            "saved_milliseconds": stats.saved_milliseconds,
        },
    }

"""`offload images`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.options import gateway_option, project_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import session_argument, settings_of
from offload_client.cli.sessionrows import fill_template
from offload_client.cli.tables import ago, format_table, rfc3339
from offload_client.settings import resolve_settings
from offload_core.errors import NotFoundError
from offload_proto.v1.builds_service_pb2 import BuildState, ListRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.builds_service_pb2 import Build
    from offload_proto.v1.sessions_service_pb2 import Session

MAX_BUILDS = 500
SHORT_DIGEST = len("sha256:") + 12
COLUMNS = {
    "IMAGE": "Name",
    "DIGEST": "ShortDigest",
    "BUILD ID": "Build",
    "PLATFORMS": "Platforms",
    "BUILT": "Built",
    "BY": "Member",
    "NODE": "Node",
    "AT HAND": "AtHand",
}


@click.command()
@session_argument()
@click.option("-a", "--all", "older", is_flag=True, help="Also former images of the same name.")
@click.option("-q", "--quiet", is_flag=True, help="Print digests only.")
@project_option
@gateway_option
@click.option(
    "--format",
    "output",
    default="table",
    show_default=True,
    metavar="FORMAT",
    help='"table", "json" (one object in each line), or a template such as "{{.Name}}".',
)
@click.pass_obj
def images(
    invocation: Invocation,
    session: str | None,
    project: str | None,
    gateway: str | None,
    output: str,
    *,
    older: bool,
    quiet: bool,
) -> int:
    """List what was built in the project and can be run in a session, newest first.

    An image is at hand when the session's owner has built it on the session's node: 'docker run
    NAME' takes it from there, and nothing travels to this machine. What its owner has built at
    other nodes comes with 'offload pull BUILD'. 'docker images' lists those within the session.

    \b
    Examples:
      offload images
      offload images training --all
    """
    from offload_client.sessions.attaching import Attachments

    local = Attachments(invocation)
    record = local.chosen(session) if session or local.records() else None
    if record is None or project or gateway:
        settings = resolve_settings(invocation, gateway=gateway, project=project)
    else:
        settings = settings_of(record)

    async def run(connections: Connections) -> None:
        from offload_client.sessions.gatewaycalls import SessionCalls

        calls = await SessionCalls.open_for(invocation, settings, connections)
        found_session = None
        if record is not None:
            try:
                found_session = await calls.get(record.session_id)
            except NotFoundError:
                invocation.err(f'WARNING: the session "{record.name}" is gone')
        request = ListRequest(project_id=settings.project, page_size=MAX_BUILDS)
        found = (await calls.calls.call(calls.calls.builds.List, request)).builds
        rows = [image_row(build, found_session) for build in with_images(found, older=older)]
        for line in _lines(rows, output, quiet=quiet):
            invocation.out(line)

    return run_async(invocation, run)


def with_images(builds: Iterable[Build], *, older: bool) -> list[Build]:
    """Return the builds whose image can be run: of each name the newest.

    Args:
        builds: newest first.
        older: also those that a newer one of the same name and platforms follows.
    """
    seen = set()
    found = []
    for build in builds:
        if build.state != BuildState.BUILD_STATE_SUCCEEDED or not build.image_digest:
            continue
        key = build.name, tuple(build.platforms)
        if key in seen and not older:
            continue
        seen.add(key)
        found.append(build)
    return found


def image_row(build: Build, session: Session | None) -> dict[str, Any]:
    """Return the columns of one image.

    Args:
        build: that has made it.
        session: in which it is to be run; None when there is none.
    """
    at_hand = "-"
    if session is not None:
        same = (build.node_id, build.member) == (session.node_id, session.owner)
        at_hand = "yes" if same else "no"
    return {
        "Name": build.name,
        "Digest": build.image_digest,
        "ShortDigest": build.image_digest[:SHORT_DIGEST],
        "Build": build.build_id,
        "Platforms": ",".join(build.platforms) or "node's own",
        "Built": ago(build.completed_at),
        "BuiltAt": rfc3339(build.completed_at) or "",
        "Member": build.member,
        "Node": build.node_id,
        "AtHand": at_hand,
    }


def _lines(rows: list[dict[str, Any]], output: str, *, quiet: bool) -> list[str]:
    if quiet:
        return [row["Digest"] for row in rows]
    if output == "json":
        return [json.dumps(row) for row in rows]
    if output != "table":
        return [fill_template(output, row) for row in rows]
    if not rows:
        return ["nothing with an image was built in this project yet"]
    return [format_table(list(COLUMNS), [[row[name] for name in COLUMNS.values()] for row in rows])]

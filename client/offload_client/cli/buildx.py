"""`offload buildx`: the pool as a builder of stock docker buildx."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import click

from offload_client.buildx.builders import (
    DEFAULT_NAME,
    Builder,
    certificate_times,
    check_name,
    find_builder,
    forget_builder,
    list_builders,
    note_due,
)
from offload_client.buildx.creation import create_builder
from offload_client.buildx.registration import Registration
from offload_client.buildx.renewal import TURN_SECONDS, alone
from offload_client.buildx.renewal import refresh as refresh_builders
from offload_client.buildx.store import BuildxStore
from offload_client.cli.options import gateway_option, pretty_or_json, project_option
from offload_client.cli.process import report, run_async
from offload_client.cli.tables import format_table, moment
from offload_client.settings import resolve_settings
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.group()
def buildx() -> None:
    """Use the pool as a builder of stock docker buildx.

    \b
    Examples:
      offload buildx create --use
      docker buildx build .
      offload buildx refresh --quiet
    """


@buildx.command()
@click.argument("name", default=DEFAULT_NAME, metavar="[NAME]")
@click.option("--use", is_flag=True, help="Make it the builder that docker buildx uses.")
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    metavar="PLATFORMS",
    help='Platforms that buildx takes it for, as in "linux/amd64,linux/arm64"; else it asks.',
)
@click.option("--node", default="", metavar="NAME", help="What buildx calls its node.")
@project_option
@gateway_option
@click.pass_obj
def create(
    invocation: Invocation,
    name: str,
    *,
    use: bool,
    platforms: tuple[str, ...],
    node: str,
    project: str | None,
    gateway: str | None,
) -> int:
    """Make a builder of docker buildx that builds in a project of the pool.

    One of the same name that was made before is replaced. Where buildx is not installed yet, its
    files are written, so that it finds the builder later.

    \b
    Examples:
      offload buildx create --use
      offload buildx create shop --project shop --platform linux/amd64,linux/arm64
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)
    builder = Builder(
        check_name(name), settings.gateway, settings.project, _platforms(platforms),
        check_name(node) if node else "",
    )  # fmt: skip

    async def run(connections: Connections) -> None:
        registration = Registration(invocation)
        await create_builder(invocation, connections, registration, builder, use=use)
        invocation.out(
            f'The builder "{builder.name}" builds in the project "{builder.project}" '
            f"at {builder.gateway}"
        )
        if not registration.program:
            invocation.err("docker buildx is not installed here; its files were written")
        if not use:
            invocation.out(f"Use it with: docker buildx build --builder {builder.name} ...")
        name = "" if builder.name == DEFAULT_NAME else f" {builder.name}"
        invocation.out(f'For docker build as well: eval "$(offload buildx env{name})"')

    return run_async(invocation, run)


@buildx.command("ls")
@pretty_or_json
@click.pass_obj
def list_(invocation: Invocation, output: str) -> None:
    """List the builders that were made here, with their certificates."""
    registration = Registration(invocation)
    current = registration.store.current()
    rows = []
    for builder in list_builders(invocation):
        times = certificate_times(invocation, builder)
        known = registration.is_ours(builder.name)
        rows.append(
            {
                "name": builder.name,
                "project": builder.project,
                "gateway": builder.gateway,
                "platforms": list(builder.platforms),
                "in_buildx": known,
                "current": known and builder.name == current,
                "valid_until": moment(times[1]) if times else None,
            }
        )
    if output == "json":
        invocation.out(json.dumps(rows, indent=2))
        return
    cells = [
        (
            f"{row['name']}{'*' if row['current'] else ''}",
            str(row["project"]),
            str(row["gateway"]),
            "yes" if row["in_buildx"] else "no",
            str(row["valid_until"] or "none"),
        )
        for row in rows
    ]
    invocation.out(
        format_table(("NAME", "PROJECT", "GATEWAY", "IN BUILDX", "CERTIFICATE UNTIL"), cells)
    )


@buildx.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.pass_obj
def rm(invocation: Invocation, names: tuple[str, ...]) -> None:
    """Remove builders, here and from docker buildx."""
    registration = Registration(invocation)
    for builder in [find_builder(invocation, name) for name in names]:
        registration.remove(builder.name)
        forget_builder(invocation, builder.name)
        invocation.out(f'Removed the builder "{builder.name}"')
    note_due(invocation)


@buildx.command()
@click.argument("name", default=DEFAULT_NAME, metavar="[NAME]")
@click.option(
    "--shell",
    type=click.Choice(("sh", "fish", "json")),
    default="sh",
    show_default=True,
    help="Form of the lines.",
)
@click.pass_obj
def env(invocation: Invocation, name: str, shell: str) -> None:
    """Print the variables with which commands use a builder, also docker build and compose.

    \b
    Examples:
      eval "$(offload buildx env)"
      offload buildx env shop --shell fish | source
    """
    builder = find_builder(invocation, name)
    found = {"BUILDX_BUILDER": builder.name}
    if "BUILDX_CONFIG" in invocation.environment:
        found["BUILDX_CONFIG"] = str(BuildxStore(invocation.environment).folder.absolute())
    if shell == "json":
        invocation.out(json.dumps(found, indent=2))
        return
    form = "set -gx {} {}" if shell == "fish" else "export {}={}"
    for variable, value in found.items():
        invocation.out(form.format(variable, shlex.quote(value)))


@buildx.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--force", is_flag=True, help="Also before half the life of a certificate is over.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong.")
@click.pass_obj
def refresh(invocation: Invocation, names: tuple[str, ...], *, force: bool, quiet: bool) -> int:
    """Renew the certificates of builders whose half life is over, all by default.

    Every command of offload does the same in the background. On machines where only docker buildx
    is used, let cron do it:

    \b
      17 * * * *  offload buildx refresh --quiet
    """
    builders = [find_builder(invocation, name) for name in names] or list_builders(invocation)
    code = 0

    async def run(connections: Connections) -> None:
        nonlocal code
        for result in await refresh_builders(invocation, connections, builders, always=force):
            if result.problem is not None:
                code = report(invocation, result.problem)
            elif not quiet:
                news = "renewed" if result.changed else "unchanged"
                until = moment(result.expires_at)
                invocation.out(f"{result.builder.name}: {news}, valid until {until}")

    with alone(invocation, wait_seconds=TURN_SECONDS):
        return run_async(invocation, run) or code


def _platforms(texts: Sequence[str]) -> tuple[str, ...]:
    found = tuple(item.strip() for text in texts for item in text.split(",") if item.strip())
    for item in found:
        parts = item.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise InvalidValueError(
                f'--platform "{item}" is no platform; write it as in linux/amd64 or linux/arm/v7'
            )
    return found

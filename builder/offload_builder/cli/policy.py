"""`offload-builder policy`: what builds may reach, as versions in the gateway's database."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from offload_builder.cli.configuration import (
    gateway_options,
    gateway_policies,
    load_gateway_config,
    operator,
)
from offload_builder.cli.policyfile import build_policy, check, explain_target, export
from offload_builder.cli.policylearn import learn
from offload_builder.cli.policynodes import (
    in_force,
    nodes,
    read_nodes,
    wait_option,
)
from offload_builder.cli.policyoutput import finish, print_changes, rule_row
from offload_builder.cli.tables import format_option, print_record, print_records

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.egress.policy.merging import Merged
    from offload_builder.egress.policy.model import Policy
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.egressnodes import NodePolicies
    from offload_builder.gateway.egresspolicies import Applied, StoredPolicy

F = TypeVar("F", bound="Callable[..., Any]")

FILE = click.Path(dir_okay=False, path_type=Path)


def project_option(function: F) -> F:
    """Add --project."""
    return click.option(
        "--project", "project_id", metavar="NAME", default="", help="Project instead of the pool."
    )(function)


@click.group("policy")
def policy() -> None:
    """Say what builds may reach: one policy for the pool, additions for projects.

    \b
    Examples:
      offload-builder policy check policy.toml
      offload-builder policy diff policy.toml
      offload-builder policy apply policy.toml
      offload-builder policy explain pypi.org:443 --project shop
    """


@policy.command("apply")
@gateway_options
@click.argument("file", type=FILE)
@project_option
@click.option("--note", metavar="TEXT", default="", help="Why, for those who read the versions.")
@click.option(
    "--expect",
    metavar="VERSION",
    type=int,
    default=0,
    help="Version that must be the newest one now, so that nobody's change is undone.",
)
@click.option("--dry-run", is_flag=True, help="Check, and show what would change.")
@wait_option
@format_option
def apply(
    file: Path,
    project_id: str,
    note: str,
    expect: int,
    dry_run: bool,
    wait: float,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Make FILE the policy that holds; nodes follow within seconds, all rules at once.

    Connections that are open stay open, new ones obey. A file that is wrong changes nothing: it is
    told with its lines, and the command ends with 3. At its end it says at which nodes the policy
    is in force, and why not at others.

    \b
    Examples:
      offload-builder policy apply policy.toml
      offload-builder policy apply shop.toml --project shop --note "new CDN"
    """
    from offload_builder.egress.policy.reading import load_text

    config = load_gateway_config(config_file, data_dir=data_dir)
    text = load_text(file)

    async def work() -> Applied:
        async with gateway_policies(config) as (members, policies, audit):
            await _known(members, project_id)
            who = operator()
            applied = await policies.apply(
                project_id, text, file=str(file), author=who["member"], note=note,
                expected=expect, dry_run=dry_run,
            )  # fmt: skip
            if not dry_run:
                await _note(audit, project_id, f"version {applied.version} {file} {note}".strip())
            return applied

    finish(config, project_id, asyncio.run(work()), output_format, None if dry_run else wait)


@policy.command("rollback")
@gateway_options
@click.argument("version", type=click.IntRange(min=0))
@project_option
@wait_option
@format_option
def rollback(
    version: int,
    project_id: str,
    wait: float,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Make an earlier VERSION the newest one again; 0 is what holds where there is no policy.

    Rules of it that have expired since stay expired.

    Example: offload-builder policy rollback 3
    """
    config = load_gateway_config(config_file, data_dir=data_dir)

    async def work() -> Applied:
        async with gateway_policies(config) as (members, policies, audit):
            await _known(members, project_id)
            applied = await policies.rollback(project_id, version, author=operator()["member"])
            await _note(audit, project_id, f"version {version} again")
            return applied

    finish(config, project_id, asyncio.run(work()), output_format, wait)


@policy.command("versions")
@gateway_options
@project_option
@format_option
def versions(
    project_id: str, output_format: str, config_file: Path | None, data_dir: str | None
) -> None:
    """List who changed the policy, when and why, newest first, and how many nodes have it.

    Example: offload-builder policy versions --project shop
    """
    config = load_gateway_config(config_file, data_dir=data_dir)

    async def work() -> tuple[list[StoredPolicy], list[NodePolicies]]:
        async with gateway_policies(config) as (members, policies, _):
            await _known(members, project_id)
            found = await policies.versions(project_id)
        return found, await read_nodes(config) or []

    found, nodes_now = asyncio.run(work())
    rows = [
        {
            "version": item.version,
            "applied_at": item.applied_at,
            "author": item.author,
            "file": item.file,
            "note": item.note,
            "nodes": in_force(nodes_now, project_id, item.version),
        }
        for item in found
    ]
    print_records(rows, output_format, ("version", "applied_at", "author", "file", "note", "nodes"))


@policy.command("show")
@gateway_options
@project_option
@click.option("--version", type=click.IntRange(min=0), help="Text of one version.")
@click.option("--text", is_flag=True, help="The file as it was applied.")
@format_option
def show(
    project_id: str,
    version: int | None,
    text: bool,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Show the rules that hold for the pool, or for a project, with their places.

    \b
    Examples:
      offload-builder policy show --project shop
      offload-builder policy show --version 3 > policy.toml
    """
    config = load_gateway_config(config_file, data_dir=data_dir)
    if text or version is not None:
        sys.stdout.write(asyncio.run(_stored(config, project_id, version)).text)
        return
    merged, own_version = asyncio.run(_merged(config, project_id))
    rows = [rule_row(item) for item in merged.policy.rules]
    found = merged.policy
    record = {
        "pool": found.name,
        "posture": found.posture.value if found.posture else "open",
        "proxied": found.proxied,
        "check_names": found.check_names,
        "contact": found.contact,
        "pool_version": found.version,
        "project_version": own_version,
        "rules": rows,
        "refused": [str(item) for item in merged.refused],
    }
    if output_format == "json":
        print_record(record)
        return
    print(f"Posture    {record['posture']}")
    print(f"Version    {found.version}" + (f", project {own_version}" if project_id else ""))
    if found.proxied:
        print("Proxied    yes, steps reach HTTP and HTTPS only")
    if not found.check_names:
        print("Names      are not looked for within connections")
    if found.contact:
        print(f"Contact    {found.contact}")
    print_records(rows, output_format, ("rule", "does", "layer", "place", "expires"))
    for item in merged.refused:
        print(f"Left out: {item}", file=sys.stderr)


@policy.command("diff")
@gateway_options
@click.argument("file", type=FILE, required=False)
@project_option
@click.option(
    "--from", "from_version", type=click.IntRange(min=0), help="Version before; the newest one."
)
@click.option("--to", "to_version", type=click.IntRange(min=0), help="Version after, for no FILE.")
@format_option
def diff(
    file: Path | None,
    project_id: str,
    from_version: int | None,
    to_version: int | None,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Show what FILE would change, or what changed between versions, rule by rule.

    Every change says whether builds reach more with it, or less.

    \b
    Examples:
      offload-builder policy diff policy.toml
      offload-builder policy diff --from 3 --to 5 --format json
    """
    from offload_builder.egress.policy.differences import differences
    from offload_builder.egress.policy.model import Layer
    from offload_builder.egress.policy.reading import read_file
    from offload_core.errors import UsageError

    if (file is None) == (to_version is None):
        raise UsageError("give either FILE or --to VERSION")
    config = load_gateway_config(config_file, data_dir=data_dir)
    before = asyncio.run(_stored(config, project_id, from_version)).policy()
    after: Policy
    if file is not None:
        layer = Layer.PROJECT if project_id else Layer.POOL
        after = read_file(file, layer).require()
    else:
        after = asyncio.run(_stored(config, project_id, to_version)).policy()
    print_changes(differences(before, after), output_format)


@policy.command("explain")
@gateway_options
@click.argument("target", metavar="HOST:PORT|URL")
@project_option
@click.option("--file", type=FILE, help="Policy file of a pool, instead of the gateway's.")
@click.option(
    "--protocol",
    type=click.Choice(["tcp", "udp", "icmp", "any"]),
    default="tcp",
    show_default=True,
    help="What is spoken; icmp goes without a port.",
)
@click.option("--address", metavar="IP", help="Address that HOST leads to.")
@click.option(
    "--network-policy", metavar="FILE|none", help="Policy that a build brings; it only narrows."
)
@format_option
@click.pass_context
def explain(
    ctx: click.Context,
    target: str,
    project_id: str,
    file: Path | None,
    protocol: str,
    address: str | None,
    network_policy: str | None,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Say whether builds may reach HOST:PORT or a URL, by which rule and why, and whom to ask.

    Ends with 0 when they may, and with 4 when not.

    \b
    Examples:
      offload-builder policy explain pypi.org:443
      offload-builder policy explain git.corp.example:22 --address 10.1.2.3 --project shop
      offload-builder policy explain 203.0.113.7:443 --file policy.toml
      offload-builder policy explain https://github.com/our-org/app --project shop
    """
    from offload_builder.egress.policy.merging import narrow
    from offload_builder.egress.policy.reading import read_file
    from offload_core.errors import UsageError

    if file is not None and project_id:
        raise UsageError("a file is explained without --project")
    if file is not None:
        found = read_file(file).require()
    else:
        config = load_gateway_config(config_file, data_dir=data_dir)
        merged, _ = asyncio.run(_merged(config, project_id))
        found = merged.policy
    effective = narrow(found, build_policy(network_policy)) if network_policy else found
    if not explain_target(effective, target, protocol, address, output_format):
        ctx.exit(4)


policy.add_command(check)
policy.add_command(export)
policy.add_command(learn)
policy.add_command(nodes)


async def _known(members: Any, project_id: str) -> None:
    """Refuse a project that does not exist."""
    from offload_core.errors import NotFoundError

    if project_id and project_id not in {item.project_id for item in await members.list_projects()}:
        raise NotFoundError(
            f'there is no project "{project_id}"', hint="list them: offload-builder project list"
        )


async def _note(audit: Any, project_id: str, detail: str) -> None:
    from offload_builder.gateway.audit import Event

    await audit.write(Event("policy.applied", **operator(), project_id=project_id, detail=detail))


async def _stored(config: GatewayConfig, project_id: str, version: int | None) -> StoredPolicy:
    async with gateway_policies(config) as (members, policies, _):
        await _known(members, project_id)
        return await policies.get(project_id, version)


async def _merged(config: GatewayConfig, project_id: str) -> tuple[Merged, int]:
    async with gateway_policies(config) as (members, policies, _):
        await _known(members, project_id)
        return await policies.merged(project_id)

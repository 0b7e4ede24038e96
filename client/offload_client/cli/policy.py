"""`offload policy`: what the builds of a project may reach, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.process import run_async
from offload_client.cli.tables import format_table, rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_proto.v1.egress_service_pb2 import ExplainEgressRequest, GetPolicyRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.egress_service_pb2 import ExplainEgressResponse, GetPolicyResponse

REFUSED = 4
"""Exit code of `explain` for what may not be reached; that of an access that is denied."""


@click.group()
def policy() -> None:
    """Show what the builds of a project may reach, and explain why.

    \b
    Examples:
      offload policy show
      offload policy explain pypi.org:443
      offload policy learn 3f9a
    """


def project_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --project, --gateway and --format."""
    for option in (
        click.option(
            "--format", "output", type=click.Choice(("text", "json")), default="text",
            show_default=True, help="Form of the output.",
        ),
        click.option(
            "--gateway", metavar="URL", help="Gateway to use instead of the configured one."
        ),
        click.option("--project", metavar="NAME", help="Project instead of the configured one."),
    ):  # fmt: skip
        function = option(function)
    return function


@policy.command()
@project_options
@click.pass_obj
def show(invocation: Invocation, project: str | None, gateway: str | None, output: str) -> int:
    """Show the rules for the builds of the project: its pool's, and its own.

    Deny wins over allow. Private networks, metadata services and the like are denied as well,
    unless a rule names them.

    \b
    Examples:
      offload policy show
      offload policy show --project shop --format json
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = GetPolicyRequest(project_id=settings.project)
        reply = await calls.call(calls.egress().GetPolicy, request)
        for item in reply.refused:
            invocation.err(f"WARNING: left out: {item}")
        if output == "json":
            invocation.out(json.dumps(policy_json(reply), indent=2))
        else:
            invocation.out(policy_text(reply))

    return run_async(invocation, run)


@policy.command()
@click.argument("target", metavar="HOST:PORT|URL")
@click.option(
    "--protocol",
    type=click.Choice(("tcp", "udp", "icmp", "any")),
    default="tcp",
    show_default=True,
    help="What is spoken; icmp goes without a port.",
)
@click.option("--address", metavar="IP", help="Address that HOST leads to.")
@project_options
@click.pass_obj
def explain(
    invocation: Invocation,
    target: str,
    protocol: str,
    address: str | None,
    project: str | None,
    gateway: str | None,
    output: str,
) -> int:
    """Say whether builds of the project may reach HOST:PORT or a URL, why, and whom to ask.

    Ends with 0 when they may, and with 4 when not.

    \b
    Examples:
      offload policy explain pypi.org:443
      offload policy explain 203.0.113.7:22 --format json
      offload policy explain https://github.com/our-org/app
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)
    allowed = False

    async def run(connections: Connections) -> None:
        nonlocal allowed
        calls = await GatewayCalls.open(invocation, settings, connections)
        request = ExplainEgressRequest(
            project_id=settings.project, target=target, protocol=protocol, address=address or ""
        )
        reply = await calls.call(calls.egress().ExplainEgress, request)
        allowed = reply.allowed
        if output == "json":
            invocation.out(json.dumps(explain_json(target, reply), indent=2))
        else:
            invocation.out(explain_text(target, reply))

    code = run_async(invocation, run)
    return code if code or allowed else REFUSED


@policy.command()
@click.argument("build_ids", metavar="BUILD...", nargs=-1, required=True)
@click.option(
    "--with-refused",
    is_flag=True,
    help="Allow what was refused as well, where no rule denies it; else it is in comments.",
)
@project_options
@click.pass_obj
def learn(
    invocation: Invocation,
    build_ids: tuple[str, ...],
    with_refused: bool,
    project: str | None,
    gateway: str | None,
    output: str,
) -> int:
    """Print an allow-list for what builds reached, to be read by a person.

    It is a policy file; an administrator applies it. With --format json it comes with everything
    that was reached and refused.

    \b
    Examples:
      offload policy learn 3f9a > policy.toml
      offload policy learn 3f9a 77c2 --with-refused
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)

    async def run(connections: Connections) -> None:
        from offload_client.build.networkreport import learn as ask
        from offload_client.build.networkreport import report_json

        calls = await GatewayCalls.open(invocation, settings, connections)
        reply = await ask(calls, build_ids, with_refused=with_refused)
        if output == "json":
            invocation.out(json.dumps(report_json(reply), indent=2))
        else:
            invocation.out(reply.text.rstrip("\n"))

    return run_async(invocation, run)


def policy_text(reply: GetPolicyResponse) -> str:
    """Return a policy for people."""
    lines = [f"Pool      {reply.pool}"] if reply.pool else []
    meaning = {
        "open": "all is allowed but what is denied",
        "allowlist": "only what a rule allows is allowed",
    }
    lines.append(f"Posture   {reply.posture}: {meaning.get(reply.posture, '')}".rstrip(": "))
    own = f", project {reply.project_version}" if reply.project_version else ""
    lines.append(f"Version   {reply.pool_version}{own}")
    if reply.contact:
        lines.append(f"Contact   {reply.contact}")
    rows = [(item.rule_id, item.text, item.layer, item.place) for item in reply.rules]
    if rows:
        lines += ["", format_table(("RULE", "DOES", "LAYER", "PLACE"), rows)]
    return "\n".join(lines)


def policy_json(reply: GetPolicyResponse) -> dict[str, Any]:
    """Return a policy for machines; field names are those of offload.v1.GetPolicyResponse."""
    return {
        "posture": reply.posture,
        "pool": reply.pool,
        "contact": reply.contact,
        "pool_version": reply.pool_version,
        "project_version": reply.project_version,
        "rules": [
            {
                "rule_id": item.rule_id,
                "text": item.text,
                "layer": item.layer,
                "place": item.place,
                "comment": item.comment,
                "owner": item.owner,
                "expires_at": rfc3339(item.expires_at),
                "preset": item.preset,
            }
            for item in reply.rules
        ],
        "refused": list(reply.refused),
    }


def explain_text(target: str, reply: ExplainEgressResponse) -> str:
    """Return an explanation for people."""
    lines = [
        f"{'Allowed' if reply.allowed else 'Refused'}   {target}",
        f"Rule      {reply.rule_id}: {reply.rule_text} ({reply.place})",
        f"Why       {reply.reason}",
    ]
    lines += [f"Note      {note}" for note in reply.notes]
    if reply.ask:
        lines.append(f"Next      {reply.ask}")
    if reply.proposal:
        lines += ["", reply.proposal]
    return "\n".join(lines)


def explain_json(target: str, reply: ExplainEgressResponse) -> dict[str, Any]:
    """Return an explanation for machines, as of offload.v1.ExplainEgressResponse."""
    return {
        "target": target,
        "allowed": reply.allowed,
        "rule_id": reply.rule_id,
        "rule_text": reply.rule_text,
        "place": reply.place,
        "reason": reply.reason,
        "layer": reply.layer,
        "notes": list(reply.notes),
        "ask": reply.ask,
        "proposal": reply.proposal,
    }

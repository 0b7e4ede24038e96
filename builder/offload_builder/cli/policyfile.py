"""Commands of `offload-builder policy` about files, which need no gateway."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload_builder.cli.tables import format_option, print_record

if TYPE_CHECKING:
    from offload_builder.egress.policy.model import EffectivePolicy, Policy

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("check")
@click.argument("file", type=FILE)
@click.option(
    "--for",
    "layer",
    type=click.Choice(["pool", "project", "build"]),
    default="pool",
    show_default=True,
    help="Whose policy FILE is.",
)
@format_option
@click.pass_context
def check(ctx: click.Context, file: Path, layer: str, output_format: str) -> None:
    """Check a policy file: every mistake with its line, in one sentence each.

    Ends with 0 when it can be used, and with 3 when not. Warnings do not count.

    \b
    Examples:
      offload-builder policy check policy.toml
      offload-builder policy check shop.toml --for project
    """
    from offload_builder.egress.policy.model import Layer
    from offload_builder.egress.policy.reading import read_file

    reading = read_file(file, Layer(layer))
    found = reading.policy
    if output_format == "json":
        print_record(
            {
                "ok": found is not None,
                "rules": len(found.rules) if found else 0,
                "findings": [
                    {
                        "file": item.place.file,
                        "line": item.place.line,
                        "serious": item.serious,
                        "sentence": item.sentence,
                    }
                    for item in reading.findings
                ],
            }
        )
    else:
        for item in reading.findings:
            print(item, file=sys.stderr)
        if found is not None:
            posture = found.posture.value if found.posture else "the pool's"
            print(f"{file} is valid: {len(found.rules)} rules, posture {posture}")
    if found is None:
        ctx.exit(3)


@click.command("export")
@click.argument("file", type=FILE)
@click.option("--kubernetes", is_flag=True, required=True, help="As manifests for a cluster.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["networkpolicy", "cilium"]),
    help="Objects to make; both by default.",
)
@click.option("--name", default="offload-egress", show_default=True, help="Name of the objects.")
@click.option("--namespace", default="", help="Namespace of the objects.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Label of the pods with BuildKit; app=buildkitd by default.",
)
def export(
    file: Path,
    kubernetes: bool,  # noqa: ARG001 - the only form there is
    kinds: tuple[str, ...],
    name: str,
    namespace: str,
    labels: tuple[str, ...],
) -> None:
    """Print a policy file as NetworkPolicy and CiliumNetworkPolicy.

    What they cannot express of what is allowed is left out, never widened; names and URLs cannot be
    denied. Comments and standard error say what is missing.

    \b
    Examples:
      offload-builder policy export policy.toml --kubernetes > egress.yaml
      offload-builder policy export policy.toml --kubernetes --kind cilium --label app=builder
    """
    from offload_builder.egress.policy.kubernetes import KINDS
    from offload_builder.egress.policy.kubernetes import export as manifests
    from offload_builder.egress.policy.reading import read_file
    from offload_core.errors import UsageError

    pods = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not (key and equals):
            raise UsageError(f'"{label}" is not a label; write KEY=VALUE')
        pods[key] = value
    made = manifests(
        read_file(file).require(), kinds=kinds or KINDS, name=name, namespace=namespace, pods=pods
    )
    sys.stdout.write(made.text)
    for gap in made.gaps:
        print(f"not expressed: {gap}", file=sys.stderr)


def build_policy(text: str) -> Policy:
    """Return the policy that a build brings: that of a file, or "none" for no network at all.

    Raises:
        ConfigError: the file cannot be used.
    """
    from offload_builder.egress.policy.merging import NO_NETWORK
    from offload_builder.egress.policy.model import Layer
    from offload_builder.egress.policy.reading import read_file

    return NO_NETWORK if text == "none" else read_file(Path(text), Layer.BUILD).require()


def explain_target(
    policy: Policy | EffectivePolicy,
    target: str,
    protocol: str,
    address: str | None,
    output_format: str,
) -> bool:
    """Print what a policy says about a target; return whether it is allowed.

    Raises:
        InvalidValueError: target or address cannot be understood.
    """
    from dataclasses import replace

    from offload_builder.egress.policy.explain import explain
    from offload_builder.egress.policy.model import Protocol
    from offload_builder.egress.policy.targets import parse_attempt

    attempt = parse_attempt(target, Protocol(protocol))
    if address is not None and attempt.host is not None:
        attempt = replace(attempt, address=_address(address))
    told = explain(policy, attempt)
    verdict = told.verdict
    record: dict[str, Any] = {
        "target": str(attempt),
        "allowed": verdict.allowed,
        "rule": verdict.rule_id,
        "text": verdict.rule_text,
        "place": str(verdict.place),
        "layer": verdict.layer.value,
        "reason": verdict.reason,
        "notes": list(told.notes),
        "ask": told.ask,
        "proposal": told.proposal,
    }
    if output_format == "json":
        print_record(record)
        return verdict.allowed
    print(f"{'Allowed' if verdict.allowed else 'Refused'}    {attempt}")
    print(f"Rule       {verdict.rule_id}: {verdict.rule_text} ({verdict.place})")
    print(f"Why        {verdict.reason}")
    for note in told.notes:
        print(f"Note       {note}")
    if told.ask:
        print(f"Next       {told.ask}")
    if told.proposal:
        print(f"\n{told.proposal}")
    return verdict.allowed


def _address(text: str) -> Any:
    from offload_core.errors import InvalidValueError

    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidValueError(f'"{text[:80]}" is not an address') from error

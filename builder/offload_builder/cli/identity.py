"""`offload-builder identity`: check the rules for identity providers, and try them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload_builder.cli.configuration import (
    gateway_members,
    gateway_options,
    load_gateway_config,
)
from offload_builder.cli.inputfile import read_input
from offload_builder.cli.tables import format_option, print_record, print_records
from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.oidc.policy import Issuer, Policy
    from offload_builder.gateway.oidc.rules import Verdict
    from offload_builder.gateway.tokens import TokenRecord

MAX_INPUT_BYTES = 256 << 10


@click.group("identity")
def identity() -> None:
    """Check and try the rules by which tokens of identity providers are taken."""


@identity.command("show")
@gateway_options
@format_option
def show(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """Show issuers and rules, and what clients need for their first contact.

    Fails with file and line when the rules are wrong.
    """
    from offload_builder.gateway.ca import CertificateAuthority
    from offload_builder.gateway.tokens import role_name

    config = load_gateway_config(config_file, data_dir=data_dir)
    policy = _policy(config)
    fingerprint = CertificateAuthority.open(config.data_dir).fingerprint()
    rules = [
        {
            "rule": rule.name,
            "issuer": rule.issuer,
            "role": role_name(rule.role),
            "projects": list(rule.projects),
            "line": rule.line,
        }
        for rule in policy.rules
    ]
    if output_format == "json":
        issuers = {name: issuer.url for name, issuer in policy.issuers.items()}
        print_record(
            {"ca": fingerprint, "audience": policy.audience, "issuers": issuers, "rules": rules}
        )
        return
    print(f"CA         {fingerprint}")
    print(f"Audience   {policy.audience or '-'}")
    for issuer in policy.issuers.values():
        kind = issuer.preset or ("people" if issuer.client_id else "other")
        print(f"Issuer     {issuer.name}: {issuer.url} ({kind})")
    print_records(rules, output_format, ("rule", "issuer", "role", "projects", "line"))


@identity.command("test")
@gateway_options
@click.option(
    "--claims",
    "claims_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file of claims, as they stand in a token; - for standard input.",
)
@click.option(
    "--token",
    "token_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of a token, which is verified with the keys of its issuer; - for standard input.",
)
@format_option
def test(
    claims_file: Path | None,
    token_file: Path | None,
    output_format: str,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Say which rule takes a token and what it would stand for; nothing is written.

    \b
    Examples:
      offload-builder identity test --claims claims.json
      offload-builder identity test --token - < token

    Ends with 4 when no rule matches.
    """
    from offload_builder.gateway.oidc.rules import judge, no_rule

    if (claims_file is None) == (token_file is None):
        raise UsageError("give either --claims or --token")
    config = load_gateway_config(config_file, data_dir=data_dir)
    policy = _policy(config)
    if token_file is not None:
        issuer, claims = asyncio.run(
            _verified(policy, read_input(token_file, MAX_INPUT_BYTES).decode("utf-8", "replace"))
        )
    else:
        issuer, claims = _claimed(policy, read_input(claims_file or Path("-"), MAX_INPUT_BYTES))
    verdict = judge(policy, issuer, claims)
    if output_format == "json":
        print(json.dumps(_verdict_json(verdict, config), indent=2))
    else:
        print("\n".join(_verdict_lines(verdict, config)))
    if verdict.grant is None:
        raise no_rule(issuer, claims)


@identity.command("logins")
@gateway_options
@format_option
def logins(output_format: str, config_file: Path | None, data_dir: str | None) -> None:
    """List recent logins by identity providers, newest first.

    One is ended with: offload-builder token revoke LOGIN
    """
    config = load_gateway_config(config_file, data_dir=data_dir)

    async def read() -> list[TokenRecord]:
        async with gateway_members(config) as members:
            return await members.external.list()

    rows = [_login_row(record) for record in asyncio.run(read())]
    columns = ("login", "member", "role", "rule", "state", "created_at", "run_url")
    print_records(rows, output_format, columns)


def register(group: click.Group) -> None:
    """Add the commands to a group."""
    group.add_command(identity)


def _policy(config: GatewayConfig) -> Policy:
    from offload_builder.gateway.oidc.exchange import policy_path
    from offload_builder.gateway.oidc.policyfile import read_policy

    path = policy_path(config)
    if not path.exists():
        raise NotFoundError(
            f"there are no identity rules: {path} does not exist",
            hint="docs/identity.md shows how to write them",
        )
    return read_policy(path)


async def _verified(policy: Policy, token: str) -> tuple[Issuer, dict[str, Any]]:
    from offload_builder.gateway.oidc.idtoken import TokenVerifier

    verified = await TokenVerifier(policy).verify(token)
    return verified.issuer, verified.claims


def _claimed(policy: Policy, data: bytes) -> tuple[Issuer, dict[str, Any]]:
    from offload_builder.gateway.oidc.strictjson import StrictJsonError, parse_object

    try:
        claims = parse_object(data, "the file of claims")
    except StrictJsonError as error:
        raise UsageError(str(error)) from error
    url = claims.get("iss", "")
    issuer = policy.issuer_of(url) if isinstance(url, str) else None
    if issuer is None:
        known = ", ".join(item.url for item in policy.issuers.values()) or "none"
        raise UsageError(f'no issuer has the url {url!r} of the claim "iss"; there are {known}')
    return issuer, claims


def _verdict_lines(verdict: Verdict, config: GatewayConfig) -> list[str]:
    lines = [f'Passed over "{rule.name}" (line {rule.line}): {why}' for rule, why in
             verdict.passed_over]  # fmt: skip
    shown = _verdict_json(verdict, config)
    if verdict.rule is None:
        return [*lines, "No rule matches: the token is refused."]
    lines.append(f'Matches "{verdict.rule.name}" (line {verdict.rule.line})')
    role = shown["role"] + (f" (lowered: {shown['lowered']})" if shown["lowered"] else "")
    lines += [
        f"  Member     {shown['member']}",
        f"  Role       {role}",
        f"  Projects   {', '.join(shown['projects']) or 'all'}",
        f"  Branch     {shown['branch'] if shown['bound'] else 'as the client says'}",
        f"  Kind       {shown['kind']}",
        f"  Writes     {shown['writes']}",
        f"  Run        {shown['run_url'] or '-'}",
        f"  Valid for  {shown['lifetime_seconds'] / 60:.0f} minutes",
    ]
    return lines


def _verdict_json(verdict: Verdict, config: GatewayConfig) -> dict[str, Any]:
    from offload_builder.gateway.tokens import role_name

    passed = [
        {"rule": rule.name, "line": rule.line, "why": why} for rule, why in verdict.passed_over
    ]
    grant = verdict.grant
    if grant is None or verdict.rule is None:
        return {"rule": None, "passed_over": passed}
    told = grant.identity
    kind = "fork" if told.fork else "pull request" if told.pull_request else "accepted code"
    return {
        "rule": verdict.rule.name,
        "line": verdict.rule.line,
        "passed_over": passed,
        "member": grant.member,
        "role": role_name(grant.role),
        "lowered": grant.lowered,
        "projects": list(grant.projects),
        "issuer": told.issuer,
        "subject": told.subject,
        "run_url": told.run_url,
        "bound": told.bound,
        "branch": told.branch,
        "target_branch": told.target_branch,
        "kind": kind if told.bound else "as the client says",
        "protected": told.protected_branch,
        "writes": _writes(verdict, config),
        "lifetime_seconds": grant.lifetime,
    }


def _writes(verdict: Verdict, config: GatewayConfig) -> str:
    """Return the cache scope that a build without further wishes would write."""
    from offload_builder.gateway.cachetrust import BranchBound, CacheMember, CacheTrust
    from offload_builder.gateway.tickets import CacheWish, cache_scopes

    grant = verdict.grant
    if grant is None:
        return ""
    told = grant.identity
    if not told.bound and not told.fork:
        return "the cache scope of the branch that the client names, as its role allows"
    member = CacheMember(grant.member, grant.role, BranchBound.of(told.SerializeToString()))
    trust = CacheTrust(config.default_branches, config.protected_branches)
    scopes = cache_scopes("PROJECT", member, CacheWish(told.branch, told.target_branch), trust)
    if not scopes.write:
        return "no cache scope"
    level = " (protected)" if scopes.trust_domain == "protected" else ""
    return f"{scopes.write}{level}"


def _login_row(record: TokenRecord) -> dict[str, object]:
    from datetime import UTC, datetime

    from offload_builder.gateway.tokens import role_name
    from offload_proto.v1.identity_service_pb2 import ExternalIdentity

    told = ExternalIdentity.FromString(record.identity)
    ended = record.expires_at is not None and record.expires_at <= datetime.now(UTC)
    return {
        "login": record.token_id,
        "member": record.name,
        "role": role_name(record.role),
        "projects": list(record.project_ids),
        "issuer": told.issuer,
        "subject": told.subject,
        "rule": told.rule,
        "run_url": told.run_url,
        "state": "revoked" if record.revoked_at else "ended" if ended else "valid",
        "created_at": record.created_at,
        "expires_at": record.expires_at,
    }

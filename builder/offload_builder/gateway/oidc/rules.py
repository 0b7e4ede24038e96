"""From the claims of a verified token to a member: the first rule that matches holds. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_builder.gateway.cachetrust import MAX_NAME
from offload_builder.gateway.members import PROJECT_ID
from offload_builder.gateway.oidc.patterns import claim_text, claim_texts, matches
from offload_builder.gateway.oidc.policy import ALL_PROJECTS, Issuer, Policy, Rule
from offload_builder.gateway.oidc.presets import RunFacts, plain_branch
from offload_builder.gateway.oidc.templates import fill
from offload_core.errors import AccessDeniedError
from offload_proto.v1 import identity_service_pb2 as identity_pb

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SHOWN = 500
"""Characters of a subject or URL that are kept for people."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_MAX_PLAIN = 40
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._@-]+")
_RANK = (identity_pb.ROLE_UNTRUSTED, identity_pb.ROLE_MEMBER, identity_pb.ROLE_CI)


@dataclass(frozen=True)
class Grant:
    """What a token stands for.

    Attributes:
        member: name of the member, unique for issuer, template and level of trust.
        role: of the member, lowered for forks and pull requests.
        projects: that may be used; empty for all.
        identity: who that is, for records.
        lowered: why the role is less than the rule's; empty when it is not.
        lifetime: seconds that a certificate may live.
    """

    member: str
    role: identity_pb.Role.ValueType
    projects: tuple[str, ...]
    identity: identity_pb.ExternalIdentity
    lowered: str
    lifetime: float


@dataclass(frozen=True)
class Verdict:
    """What all rules say, for `identity test`.

    Attributes:
        grant: of the first rule that matches; None when there is none.
        rule: that rule.
        passed_over: rules before it, each with why it does not match.
        facts: what the claims say of the run.
    """

    grant: Grant | None
    rule: Rule | None
    passed_over: tuple[tuple[Rule, str], ...]
    facts: RunFacts


def run_facts(issuer: Issuer, claims: dict[str, Any]) -> RunFacts:
    """Return what claims say of a run, by the issuer's preset or its table `claims`."""
    if issuer.known is not None:
        return issuer.known.facts(claims, issuer.url)
    told = {name: fill(template, claims) for name, template in issuer.claims.items()}
    return RunFacts(
        member=told.get("member") or claim_text(claims, "sub"),
        branch=plain_branch(told.get("branch", "")),
        target_branch=plain_branch(told.get("target_branch", "")),
        # What is neither yes nor no is taken for the worse.
        pull_request=told.get("pull_request", "") not in ("", "false", "0"),
        fork=told.get("fork", "") not in ("", "false", "0"),
        protected=told["protected"] == "true" if "protected" in told else None,
        run_url=told.get("run_url", ""),
        bound="branch" in issuer.claims,
    )


def judge(policy: Policy, issuer: Issuer, claims: dict[str, Any]) -> Verdict:
    """Return what the rules make of the claims of a token that was verified.

    Raises:
        AccessDeniedError: a rule matches, but its project cannot be one.
    """
    facts = run_facts(issuer, claims)
    passed: list[tuple[Rule, str]] = []
    for rule in policy.rules:
        reason = why_not(rule, issuer, claims, facts)
        if not reason:
            return Verdict(_grant(rule, issuer, claims, facts), rule, tuple(passed), facts)
        passed.append((rule, reason))
    return Verdict(None, None, tuple(passed), facts)


def why_not(rule: Rule, issuer: Issuer, claims: dict[str, Any], facts: RunFacts) -> str:
    """Return why a rule does not match; empty when it does."""
    if rule.issuer != issuer.name:
        return f"it is for the issuer {rule.issuer}"
    for wanted, found, name in (
        (rule.fork, facts.fork, "a run of a fork"),
        (rule.pull_request, facts.pull_request, "a pull request"),
        (rule.protected, bool(facts.protected), "a run on a protected branch"),
    ):
        if wanted is not None and wanted != found:
            return f"this is {'' if found else 'not '}{name}"
    return _unfulfilled(rule.when, claims) or _excluded(rule.unless, claims)


def no_rule(issuer: Issuer, claims: dict[str, Any]) -> AccessDeniedError:
    """Return the refusal of a token that no rule matches."""
    subject = claim_text(claims, "sub")
    return AccessDeniedError(
        f'no identity rule of the gateway matches "{_shown(subject)}" of {issuer.url}',
        hint="an administrator can add one; 'offload-builder identity test' says what rules want",
    )


def _unfulfilled(when: Mapping[str, tuple[str, ...]], claims: dict[str, Any]) -> str:
    for claim, patterns in when.items():
        texts = _usable(claims, claim)
        if not texts:
            return f"the token has no claim {claim}"
        if not any(matches(pattern, text) for pattern in patterns for text in texts):
            wanted = " or ".join(f'"{item}"' for item in patterns[:3])
            return f'{claim} is "{_shown(", ".join(texts), 120)}", not {wanted}'
    return ""


def _excluded(unless: Mapping[str, tuple[str, ...]], claims: dict[str, Any]) -> str:
    for claim, patterns in unless.items():
        for text in claim_texts(claims, claim):
            if any(matches(pattern, text) for pattern in patterns):
                return f'{claim} is "{_shown(text, 120)}", which the rule excludes'
    return ""


def _usable(claims: dict[str, Any], claim: str) -> tuple[str, ...]:
    # An address that its provider has not verified can be anybody's (OpenID Connect Core, 5.7).
    unverified = "email_verified" in claims and claim_text(claims, "email_verified") != "true"
    if claim == "email" and unverified:
        return ()
    return claim_texts(claims, claim)


def _grant(rule: Rule, issuer: Issuer, claims: dict[str, Any], facts: RunFacts) -> Grant:
    role, lowered = _lowered(rule.role, facts)
    text = fill(rule.member, claims) if rule.member else facts.member
    if not text:
        raise AccessDeniedError(
            f'the rule "{rule.name}" matches, but the token does not say what its member is called'
        )
    if facts.fork:
        # What one fork builds is nothing that another one should find in its cache.
        text = f"{text} {facts.fork_name}"
    if max(len(facts.branch), len(facts.target_branch)) > MAX_NAME:
        raise AccessDeniedError(f"the branch in the token has more than {MAX_NAME} characters")
    identity = identity_pb.ExternalIdentity(
        issuer=issuer.url,
        subject=_shown(claim_text(claims, "sub")),
        run_url=_shown(facts.run_url),
        rule=rule.name,
        bound=facts.bound,
        branch=facts.branch,
        target_branch=facts.target_branch,
        pull_request=facts.pull_request,
        fork=facts.fork,
        protected_branch=facts.protected is not False
        and not facts.pull_request
        and not facts.fork
        and role in (identity_pb.ROLE_CI, identity_pb.ROLE_ADMIN),
    )
    return Grant(
        member=member_name(issuer.name, text, role),
        role=role,
        projects=_projects(rule, claims),
        identity=identity,
        lowered=lowered,
        lifetime=issuer.certificate_lifetime,
    )


def _lowered(
    role: identity_pb.Role.ValueType, facts: RunFacts
) -> tuple[identity_pb.Role.ValueType, str]:
    """Return the role that a run may have at most, whatever a rule says."""
    for applies, most, why in (
        (facts.fork, identity_pb.ROLE_UNTRUSTED, "the code comes from a fork"),
        (facts.pull_request, identity_pb.ROLE_MEMBER, "it builds what is not accepted yet"),
    ):
        if applies and (role not in _RANK or _RANK.index(role) > _RANK.index(most)):
            return most, why
    return role, ""


def member_name(issuer: str, text: str, role: int) -> str:
    """Return the name of a member: "ISSUER+TEXT", with a digest where that is not the whole.

    Nodes know members by their names, so two that may differ in trust never share one; "+" stands
    in no name of an issuer.
    """
    untrusted = role == identity_pb.ROLE_UNTRUSTED
    if not untrusted and len(text) <= _MAX_PLAIN and _PLAIN_NAME.fullmatch(text):
        return f"{issuer}+{text}"
    level = "untrusted" if untrusted else "trusted"
    digest = hashlib.sha256(f"{issuer}\n{level}\n{text}".encode()).hexdigest()[:16]
    kept = _NOT_PLAIN.sub("-", text).strip("-.")[: 64 - len(issuer) - len(digest) - 2]
    return f"{issuer}+{kept}+{digest}"


def _projects(rule: Rule, claims: dict[str, Any]) -> tuple[str, ...]:
    if rule.projects == (ALL_PROJECTS,):
        return ()
    names = []
    for template in rule.projects:
        name = fill(template, claims) if "{" in template else template
        if PROJECT_ID.fullmatch(name) is None:
            raise AccessDeniedError(
                f'the rule "{rule.name}" makes "{_shown(name, 60)}" of {template}, '
                "which cannot be the name of a project"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def _shown(text: str, most: int = MAX_SHOWN) -> str:
    """Return a text of a stranger without control characters, bounded."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= most else f"{printable[: most - 3]}..."

"""Says why something is allowed or refused, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import (
    Action,
    Attempt,
    EffectivePolicy,
    HostTarget,
    Layer,
    Policy,
    ProtectedRange,
    Protocol,
    Rule,
    Verdict,
    protected_range,
)
from offload_builder.egress.policy.urlrules import UrlEvaluator
from offload_builder.egress.policy.weburl import AmbiguousUrlError, UrlTarget, normal_path

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NOTES = 5


@dataclass(frozen=True)
class Explanation:
    """Everything that is worth knowing about one attempt.

    Attributes:
        notes: rules that nearly matched, and what else counts; sentences.
        ask: whom to ask for what; empty when allowed.
        proposal: rule in TOML that would allow it; empty when allowed, or when none can.
    """

    attempt: Attempt
    verdict: Verdict
    notes: tuple[str, ...] = ()
    ask: str = ""
    proposal: str = ""


def explain(
    policy: Policy | EffectivePolicy,
    attempt: Attempt,
    *,
    now: datetime | None = None,
    guarded: tuple[ProtectedRange, ...] = (),
) -> Explanation:
    """Return what a policy says about an attempt, and why."""
    effective = policy if isinstance(policy, EffectivePolicy) else EffectivePolicy(policy)
    moment = now or datetime.now(UTC)
    by_url = attempt.url is not None and effective.base.proxied
    evaluator = UrlEvaluator if by_url else Evaluator
    verdict = evaluator(effective, guarded).verdict(attempt, moment)
    notes = list(_notes(effective, attempt, verdict, moment))
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"{len(notes) - MAX_NOTES} further rules nearly match"]
    if verdict.allowed:
        return Explanation(attempt, verdict, tuple(notes))
    proposal = _proposal(effective.base, attempt, verdict, guarded)
    ask = _ask(effective.base, attempt, verdict, possible=bool(proposal))
    return Explanation(attempt, verdict, tuple(notes), ask, proposal)


def _notes(
    effective: EffectivePolicy, attempt: Attempt, verdict: Verdict, now: datetime
) -> Iterator[str]:
    if attempt.url is not None and not effective.base.proxied:
        yield "without proxied = true at the top of the policy only the host and the port count"
    allowing = next((rule for rule in effective.base.rules if rule.id == verdict.rule_id), None)
    if allowing is not None and allowing.via:
        yield "it is reached through a connector, while one is online: offload connect --list"
    elif verdict.allowed and attempt.host is not None and attempt.address is None:
        yield "its addresses count too: protected and denied ones among them are not reached"
    for policy in (effective.base, *effective.narrowed_by):
        for rule in policy.rules:
            if rule.id == verdict.rule_id and rule.urls and attempt.url is None:
                yield f"of this server {_urls(rule)} only"
            if rule.id != verdict.rule_id and _means(rule, attempt):
                note = _note(rule, attempt, verdict, now)
                if note:
                    yield f"{note} ({rule.place})"


def _means(rule: Rule, attempt: Attempt) -> bool:
    host, address = attempt.host, attempt.address
    if host is not None and any(target.matches(host) for target in rule.hosts):
        return True
    if host is not None and any(target.names_host(host) for target in rule.urls):
        return True
    return address is not None and any(address in network for network in rule.networks)


def _note(rule: Rule, attempt: Attempt, verdict: Verdict, now: datetime) -> str:
    verb = "allows" if rule.action is Action.ALLOW else "denies"
    if not rule.holds_at(now) and rule.expires is not None:
        day = (rule.expires - timedelta(microseconds=1)).date()
        past = "allowed" if rule.action is Action.ALLOW else "denied"
        return f'the rule "{rule.id}" {past} it until {day}'
    if rule.urls:
        return _url_note(rule, attempt, verdict)
    if not rule.speaks(attempt.protocol, attempt.port):
        ports = ", ".join(str(item) for item in rule.ports) or "all ports"
        return f'the rule "{rule.id}" {verb} {ports} ({rule.protocol.value}) only'
    if verdict.allowed or rule.action is Action.DENY:
        return f'the rule "{rule.id}" {verb} it as well'
    return f'the rule "{rule.id}" would allow it'


def _url_note(rule: Rule, attempt: Attempt, verdict: Verdict) -> str:
    verb = "allows" if rule.action is Action.ALLOW else "denies"
    shown = _urls(rule)
    if attempt.url is None or not verdict.allowed or rule.action is Action.DENY:
        return f'the rule "{rule.id}" {verb} {shown} only'
    return f'the rule "{rule.id}" {verb} {shown} as well'


def _urls(rule: Rule) -> str:
    shown = ", ".join(str(target) for target in rule.urls[:MAX_NOTES])
    return f"{shown} and others" if len(rule.urls) > MAX_NOTES else shown


def _ask(policy: Policy, attempt: Attempt, verdict: Verdict, *, possible: bool) -> str:
    whom = policy.contact or "an administrator of the pool"
    if verdict.layer is Layer.BUILD:
        return f"the build itself asked for this: see {verdict.place}"
    denying = next((rule for rule in policy.rules if rule.id == verdict.rule_id), None)
    if denying is not None:
        owner = denying.owner or whom
        return f'ask {owner}, who owns the rule "{denying.id}" in {denying.place}'
    if not possible:
        return "no rule can allow this address"
    return f"ask {whom} for {attempt}, with the rule below"


def _proposal(
    policy: Policy, attempt: Attempt, verdict: Verdict, guarded: tuple[ProtectedRange, ...]
) -> str:
    if verdict.place.line or verdict.layer is Layer.BUILD:
        # A rule forbids it; another one would not help.
        return ""
    found = protected_range(attempt.address, guarded) if attempt.address else None
    if found is not None and (found in guarded or not found.openable):
        return ""
    by_name = attempt.host is not None and found is None
    if by_name and attempt.url is not None and policy.proxied:
        url = attempt.url
        try:
            target = UrlTarget(url.scheme, url.host, False, url.port, normal_path(url.path))
        except AmbiguousUrlError:
            return ""
        return f'[[rule]]\nid = "{_rule_id(f"{url.host}{url.path}")}"\nallow = ["{target}"]'
    place = attempt.host if by_name else str(attempt.address)
    lines = ["[[rule]]", f'id = "{_rule_id(str(place))}"', f'allow = ["{place}"]']
    if attempt.port is not None:
        lines.append(f"ports = [{attempt.port}]")
    if attempt.protocol is not Protocol.TCP:
        lines.append(f'protocol = "{attempt.protocol.value}"')
    return "\n".join(lines)


def _rule_id(target: str) -> str:
    letters = "".join(char if char.isalnum() else "-" for char in target.lower())
    return "-".join(part for part in letters.split("-") if part)[:40].rstrip("-")


def rule_toml(rule: Rule) -> str:
    """Return a rule as a policy file has it."""
    lines = ["[[rule]]", f'id = "{rule.id}"']
    targets = ", ".join(f'"{target}"' for target in rule.targets)
    lines.append(f"{rule.action.value} = [{targets}]")
    if rule.ports:
        ports = (str(item.first) if item.first == item.last else f'"{item}"' for item in rule.ports)
        lines.append(f"ports = [{', '.join(ports)}]")
    default = Protocol.TCP if rule.action is Action.ALLOW else Protocol.ANY
    if rule.protocol is not default and not rule.urls:
        lines.append(f'protocol = "{rule.protocol.value}"')
    if rule.private and any(isinstance(item, HostTarget | UrlTarget) for item in rule.targets):
        lines.append("private = true")
    if rule.via:
        lines.append(f'via = "{rule.via}"')
    return "\n".join(lines)

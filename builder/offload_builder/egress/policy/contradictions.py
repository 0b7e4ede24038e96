"""Rules of one policy that cannot both be meant, or that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import (
    Action,
    HostTarget,
    Layer,
    NetworkTarget,
    Policy,
    PortRange,
    Posture,
    Protocol,
    Rule,
    Target,
    opened_range,
)
from offload_builder.egress.policy.tables import TargetTable
from offload_builder.egress.policy.weburl import UrlTarget

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload_builder.egress.policy.model import Place


def contradictions(policy: Policy) -> Iterator[tuple[Place, bool, str]]:
    """Yield what is wrong: where, whether the policy is no use with it, and the sentence."""
    denied = TargetTable(rule for rule in policy.rules if rule.action is Action.DENY)
    allowed = TargetTable(rule for rule in policy.rules if rule.action is Action.ALLOW)
    for rule in policy.rules:
        if rule.action is Action.ALLOW:
            yield from _denied(rule, denied)
            yield from _needless(rule, allowed, policy)


def _denied(rule: Rule, denied: TargetTable) -> Iterator[tuple[Place, bool, str]]:
    hit: list[tuple[Target, Rule]] = []
    for target in rule.targets:
        by = next((item for item in denied.covering(target) if speaks_all(item, rule)), None)
        if by is not None:
            hit.append((target, by))
    if not hit:
        return
    by = hit[0][1]
    if len(hit) == len(rule.targets) and not rule.preset:
        sentence = (
            f'the rule "{rule.id}" can never allow anything, because the rule "{by.id}" in line '
            f"{by.place.line} denies all of it; remove one of them"
        )
        yield rule.place, True, sentence
        return
    names = ", ".join(str(target) for target, _ in hit[:3])
    kind = f'the preset "{rule.preset}"' if rule.preset else f'the rule "{rule.id}"'
    because = f'the rule "{by.id}" in line {by.place.line} denies it'
    yield rule.place, False, f"{kind} cannot allow {names}, because {because}"


def _needless(
    rule: Rule, allowed: TargetTable, policy: Policy
) -> Iterator[tuple[Place, bool, str]]:
    if rule.preset:
        return
    needless: dict[str, bool] = {}

    def counts(other: Rule) -> bool:
        if other.id not in needless:
            needless[other.id] = _makes_needless(other, rule)
        return needless[other.id]

    first: Rule | None = None
    for target in rule.targets:
        found = next((item for item in allowed.covering(target) if counts(item)), None)
        first = first or found
        if found is None:
            first = None
            break
    if first is not None:
        yield rule.place, False, f'the rule "{rule.id}" adds nothing to the rule "{first.id}"'
    elif policy.posture is Posture.OPEN and policy.layer is Layer.POOL and not opens(rule):
        yield (
            rule.place,
            False,
            f'the rule "{rule.id}" changes nothing: the posture "open" allows it anyway',
        )


def _makes_needless(other: Rule, rule: Rule) -> bool:
    if other is rule or other.private != rule.private or not speaks_all(other, rule):
        return False
    if other.via != rule.via:
        return False
    if other.expires is not None and (rule.expires is None or rule.expires > other.expires):
        return False
    # Of two that are alike, the later one is needless.
    alike = speaks_all(rule, other) and set(rule.targets) == set(other.targets)
    return not alike or other.place.line < rule.place.line


def opens(rule: Rule) -> bool:
    """Return whether an allow rule opens something that no posture does."""
    if rule.private or rule.via:
        return True
    return any(opened_range(item) is not None for item in rule.networks)


def speaks_all(one: Rule, other: Rule) -> bool:
    """Return whether the first rule matches every protocol and port that the other does."""
    if one.protocol not in (Protocol.ANY, other.protocol):
        return False
    if not one.ports:
        return True
    theirs = other.ports or tuple(PortRange(url.port, url.port) for url in other.urls)
    if other.protocol is Protocol.ICMP or not theirs:
        return False
    return all(any(mine.covers(ports) for mine in one.ports) for ports in theirs)


def covers(one: Target, other: Target) -> bool:
    """Return whether everything that the second target means is meant by the first."""
    if isinstance(one, NetworkTarget):
        return isinstance(other, NetworkTarget) and one.covers(other)
    if isinstance(other, UrlTarget):
        if isinstance(one, UrlTarget):
            return one.covers(other)
        return one.covers(HostTarget(other.name, other.wildcard))
    return isinstance(one, HostTarget) and isinstance(other, HostTarget) and one.covers(other)

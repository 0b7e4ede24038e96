"""What holds for a project and for a build.

A project may deny whatever it likes, and allow what its pool lets it. A build only narrows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload_builder.egress.policy.contradictions import covers, speaks_all
from offload_builder.egress.policy.model import (
    Action,
    EffectivePolicy,
    Layer,
    NetworkTarget,
    Policy,
    Posture,
    Rule,
    Target,
    opened_range,
)
from offload_builder.egress.policy.reading import Finding
from offload_builder.egress.policy.tables import TargetTable

NO_NETWORK = Policy(posture=Posture.ALLOWLIST, layer=Layer.BUILD, source="--network-policy none")
"""A build that reaches nothing."""


@dataclass(frozen=True)
class Merged:
    """Pool and project together.

    Attributes:
        refused: what the project allows and its pool does not let it; left out of `policy`.
    """

    policy: Policy
    refused: tuple[Finding, ...] = ()


def merge(pool: Policy, project: Policy | None) -> Merged:
    """Return the policy of a project in a pool.

    A rule of the project whose id the pool has is called `project-ID`.
    """
    if project is None:
        return Merged(pool)
    refused: list[Finding] = []
    taken = {rule.id for rule in pool.rules}
    rules = list(pool.rules)
    denied = TargetTable(rule for rule in pool.rules if rule.action is Action.DENY)
    for rule in project.rules:
        if rule.preset and rule.id in taken:
            continue
        kept = _permitted(rule, pool, denied, refused)
        if kept is None:
            continue
        name = rule.id
        while name in taken:
            name = f"project-{name}"
        taken.add(name)
        rules.append(replace(kept, id=name, layer=Layer.PROJECT))
    tightens = project.posture is Posture.ALLOWLIST
    policy = replace(
        pool,
        posture=Posture.ALLOWLIST if tightens else pool.posture,
        rules=tuple(rules),
        presets=tuple(dict.fromkeys((*pool.presets, *project.presets))),
        contact=project.contact or pool.contact,
        proxied=project.proxied or pool.proxied,
    )
    return Merged(policy, tuple(refused))


def narrow(base: Policy, *builds: Policy) -> EffectivePolicy:
    """Return what holds for a build that brings policies of its own."""
    return EffectivePolicy(base, tuple(replace(item, layer=Layer.BUILD) for item in builds))


def _permitted(
    rule: Rule, pool: Policy, denied: TargetTable, refused: list[Finding]
) -> Rule | None:
    """Return a rule of a project with the targets that it may have; None when none is left."""
    if rule.action is Action.DENY:
        return rule
    kept: list[Target] = []
    for target in rule.targets:
        by = next((item for item in denied.covering(target) if speaks_all(item, rule)), None)
        if by is not None:
            sentence = (
                f'the rule "{rule.id}" cannot allow {target}, because the pool denies it with its '
                f'rule "{by.id}"; ask {by.owner or pool.contact or "an administrator"}'
            )
            refused.append(Finding(rule.place, True, sentence))
        elif _may_allow(rule, target, pool):
            kept.append(target)
        else:
            refused.append(Finding(rule.place, True, _refusal(rule, target, pool)))
    return replace(rule, targets=tuple(kept)) if kept else None


def _may_allow(rule: Rule, target: Target, pool: Policy) -> bool:
    if any(covers(own, target) for own in pool.may_allow.targets):
        return True
    if isinstance(target, NetworkTarget):
        protected = opened_range(target.network) is not None
    else:
        protected = rule.private or bool(rule.via)
    # What an open pool allows anyway widens nothing.
    return not protected and (pool.may_allow.public or pool.posture is Posture.OPEN)


def _refusal(rule: Rule, target: Target, pool: Policy) -> str:
    owner = f"the pool {pool.name}" if pool.name else "the pool"
    whom = pool.contact or "an administrator"
    limit = (
        "lets projects allow public destinations only"
        if pool.may_allow.public
        else "does not let projects allow it"
    )
    return f'the rule "{rule.id}" allows {target}, but {owner} {limit}; ask {whom}'

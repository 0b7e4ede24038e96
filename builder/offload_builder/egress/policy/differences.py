"""What changes from one policy to another, in the terms of those who must agree to it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_builder.egress.policy.contradictions import opens, speaks_all
from offload_builder.egress.policy.model import Action, Opening, Policy, Posture, Rule
from offload_builder.egress.policy.tables import TargetTable

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOWN_TARGETS = 12


class Effect(enum.Enum):
    """What a change does to what builds may reach."""

    WIDER = "wider"
    NARROWER = "narrower"
    BOTH = "wider and narrower"
    NONE = "no effect"


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        kind: "added", "removed" or "changed".
        what: id of a rule with `rule `, or the key of a setting.
        before: in one line; empty when added.
        after: in one line; empty when removed.
        brief: what is shown instead, where these are long.
    """

    kind: str
    what: str
    before: str
    after: str
    effect: Effect
    brief: str = ""

    def __str__(self) -> str:
        sign = {"added": "+", "removed": "-", "changed": "~"}[self.kind]
        text = self.brief or self.after or self.before
        if self.kind == "changed" and not self.brief:
            text = f"{self.before} -> {self.after}"
        return f"{sign} {self.what}: {text}  [{self.effect.value}]"

    def record(self) -> dict[str, str]:
        """Return it for JSON."""
        return {
            "change": self.kind,
            "what": self.what,
            "before": self.before,
            "after": self.after,
            "effect": self.effect.value,
        }


def differences(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Return all changes: settings first, then rules in the order of the new policy."""
    return (*_settings(old, new), *_rules(old, new))


def _settings(old: Policy, new: Policy) -> Iterator[Change]:
    if old.posture is not new.posture:
        effect = Effect.NARROWER if new.posture is Posture.ALLOWLIST else Effect.WIDER
        yield Change("changed", "posture", _posture(old), _posture(new), effect)
    for key in ("proxied", "check_names"):
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            effect = Effect.NARROWER if after else Effect.WIDER
            yield Change("changed", key, str(before).lower(), str(after).lower(), effect)
    if old.may_allow != new.may_allow:
        yield Change(
            "changed", "projects_may_allow", _opening(old.may_allow), _opening(new.may_allow),
            Effect.BOTH if new.may_allow.targets and old.may_allow.targets
            else Effect.WIDER if _width(new.may_allow) > _width(old.may_allow)
            else Effect.NARROWER,
        )  # fmt: skip
    for key, before, after in (
        ("pool", old.name, new.name),
        ("contact", old.contact, new.contact),
    ):
        if before != after:
            kind = "changed" if before and after else "added" if after else "removed"
            yield Change(kind, key, before, after, Effect.NONE)


def _rules(old: Policy, new: Policy) -> Iterator[Change]:
    former = {rule.id: rule for rule in old.rules}
    postures = (old.posture, new.posture)
    for rule in new.rules:
        before = former.pop(rule.id, None)
        if before is None:
            effect = _alone(rule, postures, added=True)
            yield Change("added", f"rule {rule.id}", "", _text(rule), effect, _short(rule))
        elif _text(before) != _text(rule) or before.private != rule.private:
            effect = _changed(before, rule)
            brief = _delta(before, rule)
            yield Change("changed", f"rule {rule.id}", _text(before), _text(rule), effect, brief)
    for rule in former.values():
        effect = _alone(rule, postures, added=False)
        yield Change("removed", f"rule {rule.id}", _text(rule), "", effect, _short(rule))


def _alone(rule: Rule, postures: tuple[Posture | None, ...], *, added: bool) -> Effect:
    if rule.action is Action.ALLOW and Posture.OPEN in postures and not opens(rule):
        # Before or after, it was or will be allowed without the rule.
        return Effect.NONE
    widens = (rule.action is Action.ALLOW) is added
    return Effect.WIDER if widens else Effect.NARROWER


def _changed(before: Rule, after: Rule) -> Effect:
    if before.action is not after.action:
        return Effect.WIDER if after.action is Action.ALLOW else Effect.NARROWER
    grows, shrinks = _means_all(after, before), _means_all(before, after)
    if grows and shrinks:
        return Effect.NONE
    if not grows and not shrinks:
        return Effect.BOTH
    return Effect.WIDER if grows is (after.action is Action.ALLOW) else Effect.NARROWER


def _means_all(one: Rule, other: Rule) -> bool:
    """Return whether the first rule matches, at any time, whatever the second one does."""
    if (other.private and not one.private) or other.via != one.via:
        return False
    if one.expires is not None and (other.expires is None or one.expires < other.expires):
        return False
    table = TargetTable([one])
    return speaks_all(one, other) and all(
        next(table.covering(target), None) is not None for target in other.targets
    )


def _short(rule: Rule) -> str:
    """Return a rule without most of its targets, if it has many; else nothing."""
    if len(rule.targets) <= SHOWN_TARGETS:
        return ""
    kept = replace(rule, targets=rule.targets[:SHOWN_TARGETS])
    return f"{_text(kept)}  and {len(rule.targets) - SHOWN_TARGETS} targets more"


def _delta(before: Rule, after: Rule) -> str:
    """Return how a rule with many targets changes; nothing for one with few."""
    if max(len(before.targets), len(after.targets)) <= SHOWN_TARGETS:
        return ""
    old, new = dict.fromkeys(before.targets), dict.fromkeys(after.targets)
    parts = [f"+{target}" for target in new if target not in old]
    parts += [f"-{target}" for target in old if target not in new]
    if len(parts) > SHOWN_TARGETS:
        parts[SHOWN_TARGETS:] = [f"and {len(parts) - SHOWN_TARGETS} targets more"]
    rest = [_text(replace(rule, targets=())) for rule in (before, after)]
    if rest[0] != rest[1]:
        parts += [f"{rest[0]} -> {rest[1]}"]
    return ", ".join(parts)


def _text(rule: Rule) -> str:
    parts = [str(rule)]
    if rule.private:
        parts.append("private")
    if rule.expires is not None:
        parts.append(f"until {rule.expires:%Y-%m-%dT%H:%MZ}")
    if rule.owner:
        parts.append(f"owner {rule.owner}")
    if rule.comment and not rule.preset:
        parts.append(f"# {rule.comment}")
    return "  ".join(parts)


def _posture(policy: Policy) -> str:
    return policy.posture.value if policy.posture is not None else "pool's"


def _opening(opening: Opening) -> str:
    if opening.targets:
        return ", ".join(str(target) for target in opening.targets)
    return "public" if opening.public else "nothing"


def _width(opening: Opening) -> int:
    return 2 if opening.public else 1 if opening.targets else 0

"""Decides attempts by a policy. What the firewall and the resolver do must come to the same.

Paths of URLs do not count here, see `urlrules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_builder.egress.policy.connections import as_connections
from offload_builder.egress.policy.model import (
    BUILT_IN,
    PRIVATE_KINDS,
    Action,
    Attempt,
    EffectivePolicy,
    Layer,
    Place,
    Policy,
    PortRange,
    Posture,
    ProtectedRange,
    Protocol,
    Rule,
    Verdict,
    opened_range,
    protected_range,
)
from offload_builder.egress.policy.tables import TargetTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEFAULT_DENY = "default-deny"
DEFAULT_ALLOW = "default-allow"


@dataclass(frozen=True)
class Admission:
    """Where the addresses of a name may be reached.

    Attributes:
        ports: empty for all.
        private: addresses of `PRIVATE_KINDS` count as well.
        rule: that says so; None where all postures do.
    """

    protocol: Protocol
    ports: tuple[PortRange, ...]
    private: bool
    rule: Rule | None


class Evaluator:
    """One policy, ready for many questions.

    Rules that expire are looked at anew for each question.
    """

    def __init__(
        self, policy: Policy | EffectivePolicy, guarded: tuple[ProtectedRange, ...] = ()
    ) -> None:
        """Sort the rules.

        Args:
            policy: what holds.
            guarded: addresses of the service itself, which no rule opens.
        """
        effective = policy if isinstance(policy, EffectivePolicy) else EffectivePolicy(policy)
        self._guarded = guarded
        self._base = _Tables(effective.base)
        self._narrowed_by = [_Tables(item) for item in effective.narrowed_by]

    def verdict(self, attempt: Attempt, now: datetime | None = None) -> Verdict:
        """Return what the policy says about an attempt."""
        moment = now or datetime.now(UTC)
        first = self._base.verdict(attempt, moment, self._guarded)
        if not first.allowed:
            return first
        for tables in self._narrowed_by:
            found = tables.verdict(attempt, moment, None)
            if not found.allowed:
                return found
        return first

    def name(self, host: str, now: datetime | None = None) -> Verdict:
        """Return whether a name may be looked up at all, with the rule that says so."""
        moment = now or datetime.now(UTC)
        first = self._base.name(host, moment)
        if not first.allowed:
            return first
        for tables in self._narrowed_by:
            found = tables.name(host, moment)
            if not found.allowed:
                return found
        return first

    def connected(self, host: str, now: datetime | None = None) -> bool:
        """Return whether a name is reached through a connector, and in no other way."""
        return bool(self._base.connected(host, now or datetime.now(UTC)))

    def admissions(self, host: str, now: datetime | None = None) -> tuple[Admission, ...]:
        """Return where the addresses of a name may be reached.

        Empty when the name may not be looked up. Denied networks and protected ranges count for the
        addresses afterwards. Names that a connector serves have no addresses of their own.
        """
        moment = now or datetime.now(UTC)
        if not self.name(host, moment).allowed:
            return ()
        found = tuple(self._base.admissions(host, moment))
        for tables in self._narrowed_by:
            found = _in_common(found, tuple(tables.admissions(host, moment)))
        return found


def evaluate(
    policy: Policy | EffectivePolicy,
    attempt: Attempt,
    *,
    now: datetime | None = None,
    guarded: tuple[ProtectedRange, ...] = (),
) -> Verdict:
    """Return what a policy says about one attempt; `Evaluator` is for many."""
    return Evaluator(policy, guarded).verdict(attempt, now)


class _Tables:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        rules = as_connections(policy).rules
        self._denied = TargetTable(item for item in rules if item.action is Action.DENY)
        self._allowed = TargetTable(item for item in rules if item.action is Action.ALLOW)

    def verdict(
        self, attempt: Attempt, now: datetime, guarded: tuple[ProtectedRange, ...] | None
    ) -> Verdict:
        """Decide; with `guarded` None protected ranges are somebody else's business."""
        rule = _first(_matching(self._denied, attempt, now))
        if rule is not None:
            return self._by_rule(rule, attempt)
        if attempt.host is not None and (through := self.connected(attempt.host, now)):
            return self._through(through, attempt)
        allowing = list(_matching(self._allowed, attempt, now))
        if guarded is not None and attempt.address is not None:
            found = protected_range(attempt.address, guarded)
            if found is not None:
                opening = [rule for rule in allowing if _opens(rule, attempt, found)]
                if found in guarded or not opening:
                    return self._protected(found, attempt)
                allowing = opening
        rule = _first(allowing)
        if rule is not None:
            return self._by_rule(rule, attempt)
        return self._default(str(attempt))

    def name(self, host: str, now: datetime) -> Verdict:
        attempt = Attempt(host, None, None, Protocol.ANY)
        for table in (self._denied, self._allowed):
            rule = _first(item for item in table.of_host(host) if item.holds_at(now))
            if rule is not None:
                return self._by_rule(rule, attempt)
        return self._default(f"the name {host}")

    def connected(self, host: str, now: datetime) -> list[Rule]:
        """Return the rules that have a name reached through a connector."""
        return [rule for rule in self._allowed.of_host(host) if rule.via and rule.holds_at(now)]

    def admissions(self, host: str, now: datetime) -> Iterator[Admission]:
        if self.connected(host, now):
            return
        for rule in self._allowed.of_host(host):
            if rule.holds_at(now):
                yield Admission(rule.protocol, rule.ports, rule.private, rule)
        if self.policy.posture is Posture.OPEN:
            yield Admission(Protocol.ANY, (), False, None)

    def _by_rule(self, rule: Rule, attempt: Attempt) -> Verdict:
        what = str(attempt) if attempt.port or attempt.protocol is not Protocol.ANY else ""
        what = what or f"the name {attempt.host}"
        whose = "" if rule.layer is Layer.POOL else f" of the {rule.layer.value}"
        verb = "allows" if rule.action is Action.ALLOW else "denies"
        comment = f" ({rule.comment})" if rule.comment else ""
        return Verdict(
            rule.action is Action.ALLOW,
            rule.id,
            str(rule),
            rule.place,
            f'the rule "{rule.id}"{whose} {verb} {what}{comment}',
            rule.layer,
        )

    def _through(self, rules: list[Rule], attempt: Attempt) -> Verdict:
        """Decide about a name of connectors: no other rule, and no posture, counts for it."""
        speaking = (rule for rule in rules if rule.speaks(attempt.protocol, attempt.port))
        if (rule := _first(speaking)) is not None:
            return self._by_rule(rule, attempt)
        rule = _first(rules) or rules[0]
        why = f"{attempt.host} is reached through a connector; no rule for that allows {attempt}"
        return Verdict(False, rule.id, str(rule), rule.place, why, rule.layer)

    def _protected(self, found: ProtectedRange, attempt: Attempt) -> Verdict:
        return Verdict(
            False,
            f"protected-{found.kind}",
            f"deny {found.network}",
            BUILT_IN,
            f"{attempt.address} is protected ({found.about}), and no rule names it"
            if found.openable
            else f"{attempt.address} is protected ({found.about}), which no rule can open",
        )

    def _default(self, what: str) -> Verdict:
        policy = self.policy
        owner = f"pool {policy.name}" if policy.name else f"the {policy.layer.value}"
        place = Place(policy.source)
        if policy.posture in (Posture.OPEN, None):
            return Verdict(
                True, DEFAULT_ALLOW, 'posture "open"', place,
                f"no rule of {owner} denies {what}", policy.layer,
            )  # fmt: skip
        return Verdict(
            False, DEFAULT_DENY, 'posture "allowlist"', place,
            f"no rule of {owner} allows {what}", policy.layer,
        )  # fmt: skip


def _in_common(
    base: tuple[Admission, ...], narrower: tuple[Admission, ...]
) -> tuple[Admission, ...]:
    """Return what two policies admit both; which protected ranges, only the first one says."""
    found = (_joined(one, other) for one in base for other in narrower)
    return tuple(dict.fromkeys(item for item in found if item is not None))


def _joined(one: Admission, other: Admission) -> Admission | None:
    if one.protocol is Protocol.ANY:
        protocol = other.protocol
    elif other.protocol in (Protocol.ANY, one.protocol):
        protocol = one.protocol
    else:
        return None
    ports = one.ports or other.ports
    if one.ports and other.ports:
        pairs = ((mine, its) for mine in one.ports for its in other.ports)
        ports = tuple(
            PortRange(max(mine.first, its.first), min(mine.last, its.last))
            for mine, its in pairs
            if mine.first <= its.last and its.first <= mine.last
        )
        if not ports:
            return None
    if ports and protocol is Protocol.ICMP:
        return None
    return Admission(protocol, ports, one.private, one.rule or other.rule)


def _matching(table: TargetTable, attempt: Attempt, now: datetime) -> Iterator[Rule]:
    for rule in _meant(table, attempt):
        if rule.holds_at(now) and rule.speaks(attempt.protocol, attempt.port):
            yield rule


def _meant(table: TargetTable, attempt: Attempt) -> Iterator[Rule]:
    if attempt.host is not None:
        yield from table.of_host(attempt.host)
    if attempt.address is not None:
        yield from table.of_address(attempt.address)


def _first(rules: Iterable[Rule]) -> Rule | None:
    """Return the rule that is written first: the answer is then always the same."""
    return min(rules, key=rule_order, default=None)


def rule_order(rule: Rule) -> tuple[str, int]:
    """Return what rules are sorted by, so that it is always the same one that is named."""
    return rule.layer.value, rule.place.line


def _opens(rule: Rule, attempt: Attempt, found: ProtectedRange) -> bool:
    if not found.openable or attempt.address is None:
        return False
    if any(
        attempt.address in network and opened_range(network) is found for network in rule.networks
    ):
        return True
    named = attempt.host is not None and any(item.matches(attempt.host) for item in rule.hosts)
    return rule.private and named and found.kind in PRIVATE_KINDS

"""A policy as the resolver reads it: which names, and what their addresses may be used for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import (
    BUILT_IN,
    PRIVATE_KINDS,
    Action,
    HostTarget,
    Layer,
    PortRange,
    Rule,
    opened_networks,
    protected_range,
)
from offload_builder.egress.resolver.contract import Grant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from offload_builder.egress.policy.evaluate import Admission
    from offload_builder.egress.policy.model import (
        Address,
        EffectivePolicy,
        Network,
        Place,
        Policy,
        ProtectedRange,
    )
    from offload_builder.egress.resolver.contract import ServiceName


@dataclass(frozen=True, slots=True)
class NameVerdict:
    """What a policy says about a name.

    Attributes:
        allowed: it may be looked up.
        grants: what its addresses may be used for.
        listed: public addresses pass the firewall only if they are on its list of the project;
            not so where the posture is open.
        rule_id: of the rule that decided.
        rule_text: the rule in one line.
        place: where it is written.
        reason: one sentence for people.
        layer: whose word it is.
        connected: it leads to a connector, and has no address of its own.
    """

    allowed: bool
    grants: tuple[Grant, ...]
    listed: bool
    rule_id: str
    rule_text: str
    place: Place
    reason: str
    layer: Layer = Layer.POOL
    connected: bool = False


class NameView:
    """The names of one policy. Rules that end do so by themselves.

    Args:
        policy: what holds.
        services: hosts that the node's configuration allows beside it. A deny rule wins over them.
        guarded: protected ranges of this node, such as the networks of other projects.
    """

    def __init__(
        self,
        policy: EffectivePolicy,
        services: Iterable[ServiceName] = (),
        guarded: tuple[ProtectedRange, ...] = (),
    ) -> None:
        whole = replace(policy, base=with_services(policy.base, services))
        self._guarded = guarded
        self._contact = policy.base.contact
        self._evaluator = Evaluator(whole, guarded)
        self._opened = _opened(whole.base)

    def judge(self, name: str) -> NameVerdict:
        """Say whether a name may be looked up; it is lower case, without a dot at its end."""
        verdict = self._evaluator.name(name)
        admissions = self._evaluator.admissions(name) if verdict.allowed else ()
        reason = verdict.reason
        if not verdict.allowed and self._contact and verdict.layer is not Layer.BUILD:
            reason += f"; ask {self._contact}"
        return NameVerdict(
            allowed=verdict.allowed,
            grants=tuple(dict.fromkeys(_grants(admissions))),
            listed=all(item.rule is not None for item in admissions),
            rule_id=verdict.rule_id,
            rule_text=verdict.rule_text,
            place=verdict.place,
            reason=reason,
            layer=verdict.layer,
            connected=verdict.allowed and self._evaluator.connected(name),
        )

    def shuts_out(self, address: Address, grants: Sequence[Grant]) -> ProtectedRange | None:
        """Return the protected range for which an address has to be left out of an answer.

        Args:
            address: where a name leads.
            grants: of the name.
        """
        found = protected_range(address, self._guarded)
        if found is None:
            return None
        if found not in self._guarded and found.openable:
            if found.kind in PRIVATE_KINDS and any(grant.private for grant in grants):
                return None
            # A rule by network counts whether a name led there or not.
            if any(address in network for network in self._opened):
                return None
        return found

    def is_protected(self, address: Address) -> bool:
        """Return whether an address lies in a protected range, opened or not."""
        return protected_range(address, self._guarded) is not None


def with_services(policy: Policy, services: Iterable[ServiceName]) -> Policy:
    """Return a policy that allows hosts of the node's configuration as well."""
    return policy.with_rules(
        tuple(_service_rule(number, item) for number, item in enumerate(services))
    )


def _service_rule(number: int, service: ServiceName) -> Rule:
    return Rule(
        id=f"service-{number + 1}",
        action=Action.ALLOW,
        targets=(HostTarget(service.host),),
        ports=tuple(PortRange(port, port) for port in service.ports),
        comment=service.about,
        private=service.private,
        place=BUILT_IN,
    )


def _grants(admissions: Iterable[Admission]) -> Iterator[Grant]:
    for item in admissions:
        if not item.ports:
            yield Grant(item.protocol, None, item.private)
        for ports in item.ports:
            yield Grant(item.protocol, ports, item.private)


def _opened(policy: Policy) -> tuple[Network, ...]:
    """Return the parts of protected ranges that rules name by network."""
    return tuple(
        part
        for rule in policy.rules_at()
        if rule.action is Action.ALLOW
        for network in rule.networks
        for part in opened_networks(network)
    )

"""The policy of a project, asked about places before anything is fetched."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import BUILT_IN, Attempt, Protocol, Verdict
from offload_builder.egress.policy.urlrules import UrlEvaluator
from offload_builder.egress.resolver.nameview import with_services

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.egress.policy.model import Address, EffectivePolicy, ProtectedRange
    from offload_builder.egress.resolver.contract import ServiceName
    from offload_builder.egress.urls.locations import Location

OWN_REGISTRY = "own-registry"
"""The rule that lets builds fetch from the node itself."""


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """A registry of the node itself, from which builds may fetch images."""

    host: str
    port: int


class UrlPolicy:
    """Decides about places; immutable, a new policy is a new object.

    Args:
        policy: what holds.
        services: hosts that the node's configuration allows beside it.
        own: registries of the node itself, for images only: no step has to speak to them.
        guarded: protected ranges of this node.
        proxied: steps run behind BuildKit's proxy, so that their requests are seen by URL. It
            terminates TLS with a certificate authority of its own, and passes HTTP only.
    """

    def __init__(
        self,
        policy: EffectivePolicy,
        services: Iterable[ServiceName] = (),
        own: Iterable[OwnPlace] = (),
        guarded: tuple[ProtectedRange, ...] = (),
        *,
        proxied: bool = False,
    ) -> None:
        self.proxied = proxied
        self.contact = policy.base.contact
        whole = replace(policy, base=with_services(policy.base, services))
        self._evaluator = UrlEvaluator(whole, guarded)
        self._own = {(item.host, item.port) for item in own}

    def connected(self, host: str) -> bool:
        """Return whether a host is reached through a connector, and in no other way."""
        return self._evaluator.servers.connected(host)

    def verdict(self, place: Location) -> Verdict:
        """Say whether something may be fetched from a place.

        A name may still lead to an address that the firewall refuses.
        """
        if place.is_local:
            return _passes("local", "it comes with the build")
        if place.kind == "image" and (place.host, place.port) in self._own:
            return _passes(OWN_REGISTRY, "it is the node's own")
        address = address_in(place.host)
        host = None if address is not None else place.host
        return self._evaluator.verdict(Attempt(host, address, place.port, Protocol.TCP, place.web))

    def connection(self, host: str, address: Address | None, port: int) -> Verdict:
        """Say whether a TCP connection may be opened. Rules by URL allow their servers as a whole.

        Args:
            host: a name or an address, as it is asked for.
            address: where it leads; None while that is not known.
            port: of TCP.
        """
        servers = self._evaluator.servers
        literal = address_in(host)
        if literal is not None:
            return servers.verdict(Attempt(None, address or literal, port, Protocol.TCP))
        named = servers.name(host)
        if not named.allowed:
            return named
        return servers.verdict(Attempt(host, address, port, Protocol.TCP))


def _passes(rule_id: str, reason: str) -> Verdict:
    return Verdict(allowed=True, rule_id=rule_id, rule_text=reason, place=BUILT_IN, reason=reason)


def address_in(host: str) -> Address | None:
    """Return the address that a host is; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None

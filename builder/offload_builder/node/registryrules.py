"""The registries that an administrator set up, as rules that let builds reach them."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from offload_builder.egress.policy.model import (
    Action,
    HostTarget,
    NetworkTarget,
    Place,
    PortRange,
    Rule,
    normal_host,
)
from offload_cache.mirror.upstream import origin_address
from offload_core.trust import split_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from offload_builder.buildkit.daemon_config import RegistrySettings
    from offload_builder.egress.policy.model import Target

_HTTP_PORT, _HTTPS_PORT = 80, 443


def registry_rules(path: Path | None, settings: Mapping[str, RegistrySettings]) -> tuple[Rule, ...]:
    """Return a rule for each registry and mirror; they may lie in protected ranges.

    Args:
        path: of the file that configures them.
        settings: by host.

    Raises:
        ConfigError: a host cannot be understood.
    """
    place = Place(str(path) if path is not None else "built in")
    found: dict[tuple[Target, int], None] = {}
    for host, one in settings.items():
        found |= dict.fromkeys(_targets((origin_address(host), *one.mirrors), http=one.http))
    return tuple(
        Rule(
            f"registry-{number}",
            Action.ALLOW,
            (target,),
            (PortRange(port, port),),
            comment="registry of the node's configuration",
            private=True,
            place=place,
        )
        for number, (target, port) in enumerate(found, 1)
    )


def local_registries(rules: Iterable[Rule]) -> frozenset[tuple[str, int]]:
    """Return host and port of those that may be on the node itself: by address, and localhost.

    Builds do not reach them there, but the node does. Any other name could lead to the node
    without its administrator's knowledge.
    """
    return frozenset(
        (host, ports.first)
        for rule in rules
        for host in map(str, rule.targets)
        for ports in rule.ports
        if rule.networks or host == "localhost"
    )


def _targets(hosts: Iterable[str], *, http: bool) -> Iterable[tuple[Target, int]]:
    for host in hosts:
        scheme, _, bare = host.rpartition("://")
        bare = bare.partition("/")[0]
        plain = http or scheme == "http"
        port = _HTTP_PORT if plain else _HTTPS_PORT
        name, port = split_address(bare, default_port=port)
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            yield HostTarget(normal_host(name)), port
        else:
            yield NetworkTarget(ipaddress.ip_network(address)), port

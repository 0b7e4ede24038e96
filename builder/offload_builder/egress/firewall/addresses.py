"""Which addresses the router and the projects have.

Those of projects are seen by nobody but the router, which hides them behind its own address; that
one is seen by the machine only, which hides it once more. So two nodes of a machine need different
addresses for their uplinks only.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Network, IPv6Network

    from offload_builder.egress.policy.model import Network

PROJECT_BITS = 20
"""Prefix of a project: 2046 steps with addresses at the same time."""
DEFAULT_PROJECTS = ipaddress.IPv4Network("100.64.0.0/10")
_UPLINKS = ipaddress.IPv4Network("198.18.0.0/16")
CONNECTED = ipaddress.IPv4Network("198.19.0.0/16")
"""Stand for names that connectors serve; all of them are the router's own."""
_INNER_V6 = ipaddress.IPv6Network("fd6f:626c::/32")
_UPLINKS_V6 = ipaddress.IPv6Network("fd6f:6275::/32")
DAEMON_DEVICE = "eth0"
UPLINK_DEVICE = "uplink"


@dataclass(frozen=True)
class UplinkAddresses:
    """Both ends of the way from a router to its machine; `.1` is the machine's."""

    v4: IPv4Network
    v6: IPv6Network

    @property
    def machine_v4(self) -> str:
        """The machine's end."""
        return str(self.v4[1])

    @property
    def router_v4(self) -> str:
        """The router's end."""
        return str(self.v4[2])

    @property
    def machine_v6(self) -> str:
        """The machine's end."""
        return str(self.v6[1])

    @property
    def router_v6(self) -> str:
        """The router's end."""
        return str(self.v6[2])


@dataclass(frozen=True)
class ProjectAddresses:
    """What one project has.

    Attributes:
        slot: number of the project at this router, from 0.
        v4: all of it: the link first, the steps in the second half.
        v6: all of it: the link in the first /64, the steps in the second.
    """

    slot: int
    v4: IPv4Network
    v6: IPv6Network

    @property
    def device(self) -> str:
        """The router's device that leads to it."""
        return f"p{self.slot}"

    @property
    def gateway_v4(self) -> str:
        """The router's end of the link: name server and registry of the project."""
        return str(self.v4[1])

    @property
    def daemon_v4(self) -> str:
        """BuildKit's end of the link."""
        return str(self.v4[2])

    @cached_property
    def steps_v4(self) -> IPv4Network:
        """Addresses of steps."""
        return list(self.v4.subnets(1))[1]

    @property
    def gateway_v6(self) -> str:
        """The router's end of the link."""
        return str(self.v6[1])

    @property
    def daemon_v6(self) -> str:
        """BuildKit's end of the link."""
        return str(self.v6[2])

    @property
    def link_v6(self) -> IPv6Network:
        """The link."""
        return ipaddress.IPv6Network((int(self.v6.network_address), 64))

    @property
    def steps_v6(self) -> IPv6Network:
        """Addresses of steps."""
        return ipaddress.IPv6Network((int(self.v6.network_address) + (1 << 64), 64))


def project_count(projects: IPv4Network = DEFAULT_PROJECTS) -> int:
    """Return how many projects a router can have at the same time."""
    return 1 << max(0, PROJECT_BITS - projects.prefixlen)


def project_addresses(slot: int, projects: IPv4Network = DEFAULT_PROJECTS) -> ProjectAddresses:
    """Return the addresses of a project.

    Raises:
        ConfigError: there are not so many.
    """
    if not 0 <= slot < project_count(projects):
        raise ConfigError(f"{projects} has room for {project_count(projects)} projects only")
    start = int(projects.network_address) + (slot << (32 - PROJECT_BITS))
    return ProjectAddresses(
        slot,
        ipaddress.IPv4Network((start, PROJECT_BITS)),
        ipaddress.IPv6Network((int(_INNER_V6.network_address) + (slot << 80), 48)),
    )


def uplink_addresses(wish: int, taken: Iterable[Network]) -> UplinkAddresses:
    """Return addresses for an uplink that no route of the machine leads to.

    Args:
        wish: any number; the same one gives the same addresses where these are free.
        taken: networks that routes lead to.

    Raises:
        ConfigError: none is free.
    """
    others = [network for network in taken if isinstance(network, ipaddress.IPv4Network)]
    count = 1 << (30 - _UPLINKS.prefixlen)
    for step in range(count):
        number = (wish + step) % count
        network = ipaddress.IPv4Network((int(_UPLINKS.network_address) + number * 4, 30))
        if not any(network.overlaps(other) for other in others):
            start = int(_UPLINKS_V6.network_address) + (number << 64)
            return UplinkAddresses(network, ipaddress.IPv6Network((start, 126)))
    raise ConfigError(f"no network of {_UPLINKS} is free for the way to the router")

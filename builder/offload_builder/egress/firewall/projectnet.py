"""The network of one project: a namespace with one way out, the router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.egress.firewall import links
from offload_builder.egress.firewall.addresses import DAEMON_DEVICE, ProjectAddresses
from offload_builder.egress.firewall.namespaces import NetworkNamespace
from offload_builder.egress.firewall.nft import open_nft

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_builder.egress.firewall.router import Router


def inner_table(addresses: ProjectAddresses) -> str:
    """Return the rules inside of a project's namespace.

    Steps reach neither what listens there nor each other. A second line only: a step with
    `security.insecure` and `network.host` could remove it. What passes through to or from a step is
    not tracked here, as the router does that; twice would cost a large download more.
    """
    return f"""add table inet offload_build
delete table inet offload_build
table inet offload_build {{
  chain passing {{
    type filter hook prerouting priority raw; policy accept;
    iifname "lo" accept
    ip daddr != {addresses.daemon_v4} notrack
    ip6 daddr != {addresses.daemon_v6} notrack
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname != "{DAEMON_DEVICE}" oifname != "{DAEMON_DEVICE}" reject with icmpx admin-prohibited
  }}
}}
"""


def engine_table(addresses: ProjectAddresses) -> str:
    """Return the rules inside of the namespace of a docker engine.

    Its bridges, its published ports and what its containers say to each other are its own matter:
    it hides its containers behind the namespace's address, and so has to track what passes. From
    outside nothing begins. The node's registry is for the engine, not for containers behind a
    bridge. A second line only: who is root of the engine's user namespace can remove it.
    """
    return f"""add table inet offload_build
delete table inet offload_build
table inet offload_build {{
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname != "{DAEMON_DEVICE}" accept
    ct state established,related accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{DAEMON_DEVICE}" ct state established,related accept
    iifname "{DAEMON_DEVICE}" drop
    ip daddr {addresses.gateway_v4} tcp dport != 53 reject with tcp reset
    ip daddr {addresses.gateway_v4} meta l4proto != tcp th dport != 53 reject
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Interior:
    """What a namespace is made for.

    Attributes:
        table: returns the rules inside of it.
        users: path of the user namespace that owns it; None for this process's own.
    """

    table: Callable[[ProjectAddresses], str]
    users: Path | None = None


STEPS = Interior(inner_table)
"""A BuildKit and its steps."""


class ProjectNetwork:
    """A project's namespace and its link to the router; close it.

    Attributes:
        key: whose it is.
        addresses: of both ends and of the steps.
        ipv6: there is a way out for IPv6.
        mtu: of all devices, in bytes.
    """

    def __init__(
        self, key: str, addresses: ProjectAddresses, router: Router, interior: Interior = STEPS
    ) -> None:
        self.key = key
        self.addresses = addresses
        self.ipv6 = router.ipv6
        self.mtu = router.mtu
        self._router = router
        self._table = interior.table(addresses)
        self._inside = NetworkNamespace(addresses.device, users=interior.users)

    @property
    def namespace(self) -> Path:
        """A path of the namespace, while this object is open."""
        return self._inside.path

    async def connect(self) -> None:
        """Make devices, addresses and routes. The router lets nothing pass before it has rules.

        Raises:
            ConfigError: the machine does not allow it.
        """
        await self._router.delete_link(self.addresses.device)
        await self._inside.run(links.configure)
        await self._router.add_links(self._router_links())
        await self._inside.run(self._set_up)

    async def close(self) -> None:
        """Cut it off, and let go of the namespace."""
        try:
            await self._router.delete_link(self.addresses.device)
        finally:
            self._inside.close()

    async def cut(self) -> None:
        """Let nothing pass, whatever the rules say, until `mend`.

        Raises:
            ConfigError: it cannot be done.
        """
        await self._router.add_links([f"link set {self.addresses.device} down"])

    async def mend(self) -> None:
        """Undo `cut`; the kernel has forgotten what led through the device.

        Raises:
            ConfigError: it cannot be done.
        """
        one = self.addresses
        await self._router.add_links(
            [
                f"link set {one.device} up",
                f"address replace {one.gateway_v6}/64 dev {one.device} nodad",
                *self._routes("replace"),
            ]
        )

    def _routes(self, verb: str) -> list[str]:
        one = self.addresses
        return [
            f"route {verb} {one.steps_v4} via {one.daemon_v4} dev {one.device}",
            f"route {verb} {one.steps_v6} via {one.daemon_v6} dev {one.device}",
        ]

    def _router_links(self) -> list[str]:
        one = self.addresses
        peer = f"peer name {DAEMON_DEVICE} mtu {self.mtu} netns {self.namespace}"
        return [
            f"link add {one.device} mtu {self.mtu} type veth {peer}",
            f"address add {one.gateway_v4}/30 dev {one.device}",
            f"address add {one.gateway_v6}/64 dev {one.device} nodad",
            f"link set {one.device} up",
            *self._routes("add"),
        ]

    def _set_up(self) -> None:
        one = self.addresses
        nft = open_nft()
        try:
            nft.apply(self._table)
        finally:
            nft.close()
        commands = [
            "link set lo up",
            f"address add {one.daemon_v4}/30 dev {DAEMON_DEVICE}",
            f"address add {one.daemon_v6}/64 dev {DAEMON_DEVICE} nodad",
            f"link set {DAEMON_DEVICE} up",
            f"route add default via {one.gateway_v4} dev {DAEMON_DEVICE}",
        ]
        if self.ipv6:
            commands.append(f"route add ::/0 via {one.gateway_v6} dev {DAEMON_DEVICE}")
        links.run_ip(commands)

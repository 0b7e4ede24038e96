"""Addresses that stand for names which connectors serve: one for each name of each place.

They are the router's own, so nothing but a listener of the node answers there, and no two places
have one in common.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from offload_builder.egress.firewall.addresses import CONNECTED
from offload_core.errors import QuotaExceededError

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Network

MAX_NAMES = 512
"""Names of one place."""


class ConnectedAddresses:
    """Belongs to the event loop.

    Args:
        network: where they are taken from.
    """

    def __init__(self, network: IPv4Network = CONNECTED) -> None:
        self._network = network
        self._names: dict[str, dict[str, IPv4Address]] = {}
        self._owners: dict[str, tuple[str, str]] = {}
        self._next = 1

    def of(self, place: str, name: str) -> IPv4Address:
        """Return the address of a name; the same one until the place is forgotten.

        Raises:
            QuotaExceededError: there is none left.
        """
        names = self._names.setdefault(place, {})
        found = names.get(name)
        if found is None:
            if len(names) >= MAX_NAMES:
                raise QuotaExceededError(f"more than {MAX_NAMES} names of connectors are in use")
            found = names[name] = self._free()
            self._owners[str(found)] = (place, name)
        return found

    def name(self, place: str, address: str) -> str:
        """Return the name that an address stands for in a place; empty for none."""
        owner, name = self._owners.get(address, ("", ""))
        return name if owner == place else ""

    def forget(self, place: str) -> None:
        """Forget a place; its addresses are given away again, those that were free first."""
        for address in self._names.pop(place, {}).values():
            del self._owners[str(address)]

    def _free(self) -> IPv4Address:
        count = self._network.num_addresses - 2
        for _ in range(count):
            address = ipaddress.IPv4Address(int(self._network.network_address) + self._next)
            self._next = self._next % count + 1
            if str(address) not in self._owners:
                return address
        raise QuotaExceededError("the node has no address left for names of connectors")

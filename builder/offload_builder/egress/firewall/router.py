"""The router of a node: the namespace that everything of every project passes, and its rules."""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.egress.firewall import links, ruleset
from offload_builder.egress.firewall.addresses import CONNECTED, UPLINK_DEVICE, uplink_addresses
from offload_builder.egress.firewall.hosttable import HostTable
from offload_builder.egress.firewall.namespaces import NetworkNamespace
from offload_builder.egress.firewall.nft import Nft, open_nft
from offload_core.aio import TaskSet, finish
from offload_core.errors import ConfigError, OffloadError

if TYPE_CHECKING:
    from offload_builder.egress.firewall.addresses import UplinkAddresses
    from offload_builder.egress.policy.model import Address

_log = structlog.get_logger(__name__)

OUR_NAMESPACE = Path("/proc/self/ns/net")
REPAIR_SECONDS = 10.0
_DEFAULT_MTU = 1500
_CLEAN_UP_SECONDS = 20.0


class Router:
    """A namespace between the projects of a node and its machine; an async context manager.

    The namespace has no name and ends with this process: its rules are in force until then, and
    after that nothing passes, as the devices of all projects ended with it. What stays on the
    machine after a crash is one table, which the next start replaces.

    Args:
        data: directory of the node; names follow from it, so nodes of a machine do not clash.
        outside: namespace of the machine.
    """

    def __init__(self, data: Path, outside: Path = OUR_NAMESPACE) -> None:
        digest = hashlib.sha256(os.fsencode(data.absolute())).hexdigest()
        self._number = int(digest[:8], 16)
        self.device = f"ob{digest[:8]}"
        self._outside_path = outside
        self._tasks = TaskSet(self._crashed)
        self._stack = AsyncExitStack()
        self._outside: NetworkNamespace
        self.inside: NetworkNamespace
        self._nft: Nft
        self._host: HostTable
        self._node_addresses: frozenset[Address] = frozenset()
        self.mtu = _DEFAULT_MTU
        self.ipv6 = False

    async def __aenter__(self) -> Self:
        """Make the namespace, its way out and its rules; rules come first.

        Raises:
            ConfigError: the machine does not allow it.
            InternalError: nftables refused the rules.
        """
        async with AsyncExitStack() as stack:
            self._outside = NetworkNamespace("machine", self._outside_path)
            stack.callback(self._outside.close)
            self.inside = NetworkNamespace("router")
            stack.callback(self.inside.close)
            self._nft = await self.inside.run(open_nft)
            stack.push_async_callback(self.inside.run, self._nft.close)
            await self._open(stack)
            self._tasks.start(self._watch(), name="egress.repair")
            stack.push_async_callback(self._tasks.close)
            self._stack = stack.pop_all()
        _log.info(
            "egress.router.started",
            device=self.device,
            namespace=str(self.inside.path),
            mtu_bytes=self.mtu,
            ipv6=self.ipv6,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await finish(self._stack.aclose(), _CLEAN_UP_SECONDS)

    async def _open(self, stack: AsyncExitStack) -> None:
        await self.inside.run(self._nft.apply, ruleset.base_table(node_addresses=()))
        outside_nft = await self._outside.run(open_nft)
        stack.push_async_callback(self._outside.run, outside_nft.close)
        await self._outside.run(links.delete_link, self.device)
        out = await self._outside.run(links.outlet)
        if out is not None:
            self.mtu, self.ipv6 = out.mtu, out.ipv6
        taken = await self._outside.run(links.routed_networks)
        addresses = uplink_addresses(self._number, taken)
        self._host = HostTable(outside_nft, self.device, addresses)
        stack.push_async_callback(self._outside.run, self._host.remove)
        await self._outside.run(self._host.install)
        stack.push_async_callback(self._outside.run, links.delete_link, self.device)
        await self.inside.run(links.configure)
        await self._outside.run(links.run_ip, self._outside_links(addresses))
        await self._outside.run(self._raise_device)
        await self.inside.run(links.run_ip, self._inside_links(addresses))
        await self._learn_addresses()

    def _outside_links(self, addresses: UplinkAddresses) -> list[str]:
        device, mtu = self.device, self.mtu
        peer = f"peer name {UPLINK_DEVICE} mtu {mtu} netns {self.inside.path}"
        commands = [
            f"link add {device} mtu {mtu} type veth {peer}",
            f"address add {addresses.machine_v4}/30 dev {device}",
        ]
        if self.ipv6:
            commands.append(f"address add {addresses.machine_v6}/126 dev {device} nodad")
        return commands

    def _raise_device(self) -> None:
        links.skip_duplicate_detection(self.device)
        links.run_ip([f"link set {self.device} up"])

    def _inside_links(self, addresses: UplinkAddresses) -> list[str]:
        commands = [
            "link set lo up",
            f"route add local {CONNECTED} dev lo",
            f"address add {addresses.router_v4}/30 dev {UPLINK_DEVICE}",
            f"link set {UPLINK_DEVICE} up",
            f"route add default via {addresses.machine_v4} dev {UPLINK_DEVICE}",
        ]
        if self.ipv6:
            commands += [
                f"address add {addresses.router_v6}/126 dev {UPLINK_DEVICE} nodad",
                f"route add ::/0 via {addresses.machine_v6} dev {UPLINK_DEVICE}",
            ]
        return commands

    @property
    def node_addresses(self) -> frozenset[Address]:
        """The machine's own addresses, which no project reaches."""
        return self._node_addresses

    async def change(self, text: str) -> str:
        """Change the rules in one transaction; calls take effect in their order.

        Raises:
            InternalError: nftables refused it; nothing has changed.
        """
        return await self.inside.run(self._nft.apply, text)

    async def add_links(self, commands: list[str]) -> None:
        """Add devices, addresses or routes.

        Raises:
            ConfigError: it cannot be done.
        """
        await self.inside.run(links.run_ip, commands)

    async def delete_link(self, device: str) -> None:
        """Delete a device if it is there.

        Raises:
            ConfigError: it cannot be deleted.
        """
        await self.inside.run(links.delete_link, device)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REPAIR_SECONDS)
            try:
                await self._outside.run(self._host.repair)
                await self._learn_addresses()
            except OffloadError as error:
                # Until it works nothing passes, or what passed does; the next look tries again.
                _log.error("egress.repair.failed", error=error.message)

    async def _learn_addresses(self) -> None:
        """Keep the machine's own addresses out of reach, also those that it gets later."""
        found = frozenset(await self._outside.run(links.local_addresses))
        if found != self._node_addresses:
            await self.change(ruleset.node_elements(found))
            self._node_addresses = found

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("egress.task.failed", task=name, error=repr(error))


def why_impossible() -> str:
    """Return why this machine can have no router; empty when it can. Changes nothing."""
    if os.geteuid() != 0:
        return "the node does not run as root"
    try:
        probe = NetworkNamespace("probe")
    except ConfigError as error:
        return error.message
    probe.close()
    return ""

"""What a node tells its gateway of itself."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from offload_core import VERSION
from offload_core.trust import join_address, split_address
from offload_proto.v1.nodes_service_pb2 import Heartbeat, Hello

if TYPE_CHECKING:
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.slots import Slots
    from offload_proto.v1.nodes_service_pb2 import NodeDevices, NodePlatforms

MIN_DISK_FREE_BYTES = 512 << 20


class NodeFacts:
    """Describes a node.

    Attributes:
        listening: the address that the service for clients got.
        buildkit_address: where BuildKit clients are taken; empty when they are not.
        firewall: builds are behind a firewall.
    """

    def __init__(self, config: NodeConfig, slots: Slots) -> None:
        self._config = config
        self._slots = slots
        self.listening = config.listen
        self.buildkit_address = ""
        self.firewall = False

    def hello(self) -> Hello:
        """Introduce the node."""
        config = self._config
        return Hello(
            endpoints=[self._with_port(address) for address in config.advertise],
            relay_endpoint=config.relay_address or self.listening,
            platforms=config.native_platforms(),
            slots=config.slots,
            version=VERSION,
            buildkit_version="",
            running_build_ids=self._slots.running(),
            buildkit_endpoint=self.buildkit_address,
            firewall=self.firewall,
            labels=config.labels,
        )

    def _with_port(self, address: str) -> str:
        """Return an advertised address; port 0 stands for the one that the node listens on."""
        host, port = split_address(address)
        return address if port else join_address(host, split_address(self.listening)[1])

    def heartbeat(
        self, *, health: str, platforms: NodePlatforms | None, devices: NodeDevices | None = None
    ) -> Heartbeat:
        """Describe the node now.

        Args:
            health: what is wrong with the shared store; empty when nothing is.
            platforms: that the node can build; None while it is not known.
            devices: that builds can have here; None while it is not known.
        """
        free = shutil.disk_usage(self._config.data).free
        if free < MIN_DISK_FREE_BYTES:
            health = f"only {free >> 20} MiB are free on the disk"
        return Heartbeat(
            running=self._slots.busy,
            draining=self._slots.draining,
            disk_free_bytes=free,
            health=health,
            # Told together: with them the gateway takes what it knows of the node for all.
            platforms=platforms if devices is not None else None,
            devices=devices,
        )

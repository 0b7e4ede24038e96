"""What a BuildKit of a node is told of its network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.daemon_config import DaemonSettings
    from offload_builder.egress.firewall.daemonnet import DaemonNetwork
    from offload_builder.egress.urls.routeguard import RouteGuard
    from offload_builder.egress.urls.urlpolicy import UrlPolicy
    from offload_builder.node.egressdesk import EgressDesk
    from offload_builder.node.registryaccess import RegistryJudge


@dataclass(frozen=True, slots=True)
class Place:
    """What the BuildKit of one trust domain is told of the network.

    Attributes:
        registry_address: HOST:PORT of the node's registry, as it is reached from there.
        daemon: how the daemon is put there; None for the machine's own network.
        settled: returns when the newest policy holds there.
        urls: returns what BuildKit's sources are judged by; None for nothing.
        desk: tells builds what they reached; None where nobody hears of it.
        guard: keeps containers from running that BuildKit's proxy is not before.
        connected: says of a registry whether builds reach it through a connector only.
        judge: of what the node itself reaches for builds there; None for everything.
    """

    registry_address: str
    daemon: DaemonNetwork | None = None
    settled: Callable[[], Awaitable[None]] | None = None
    urls: Callable[[], UrlPolicy | None] = lambda: None
    desk: EgressDesk | None = None
    guard: RouteGuard | None = None
    connected: Callable[[str], bool] = lambda _: False
    judge: RegistryJudge | None = None

    async def ready(self) -> None:
        """Wait until the newest policy holds, so that a build never runs under an older one.

        Raises:
            NodeLostError: it does not hold within `isolation.SETTLE_SECONDS`.
        """
        if self.settled is not None:
            await self.settled()

    def settings(self, daemon: DaemonSettings) -> DaemonSettings:
        """Return settings with which a daemon starts there."""
        if self.guard is not None:
            daemon = replace(daemon, gate=self.guard.shell + daemon.gate)
        if self.daemon is None:
            return daemon
        return replace(
            daemon,
            command_prefix=(*self.daemon.command_prefix, *daemon.command_prefix),
            network_mode="cni",
            cni_config_path=self.daemon.cni_config,
            cni_binary_dir=self.daemon.cni_binaries,
            cni_pool_size=self.daemon.pool_size,
        )

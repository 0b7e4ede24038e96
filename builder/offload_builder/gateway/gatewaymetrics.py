"""What a gateway shows to Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from offload_builder.gateway.sessions.table import OPEN_STATES, state_name
from offload_builder.metricsport import policy_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.core import Metric

    from offload_builder.gateway.active_builds import ActiveBuilds
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.sessions.active import ActiveSessions


class GatewayGauges(Collector):
    """Nodes, builds, sessions and policies as the gateway knows them now.

    Args:
        nodes: of the pool.
        builds: that have not ended.
        versions: returns the newest versions of policies by scope.
        sessions: that have not ended.
    """

    def __init__(
        self,
        nodes: NodeRegistry,
        builds: ActiveBuilds,
        versions: Callable[[], Mapping[str, int]],
        sessions: ActiveSessions,
    ) -> None:
        self._sessions = sessions
        self._nodes = nodes
        self._builds = builds
        self._versions = versions

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges (prometheus_client's Collector)."""
        newest = self._versions()
        yield policy_versions(newest)
        connected = self._nodes.connected()
        behind = sum(_is_behind(node, newest) for node in connected)
        yield GaugeMetricFamily(
            "offload_egress_nodes_behind",
            "Attached nodes that have not the newest policies in force.",
            value=behind,
        )
        states = Counter("lost" if node.connection is None else _state(node)
                         for node in self._nodes.known())  # fmt: skip
        nodes = GaugeMetricFamily("offload_nodes", "Nodes by state.", labels=["state"])
        for state in ("ready", "draining", "lost"):
            nodes.add_metric([state], states[state])
        yield nodes
        found = self._builds.all()
        builds = GaugeMetricFamily(
            "offload_builds", "Builds that have not ended, by state.", labels=["state"]
        )
        builds.add_metric(["queued"], sum(build.queued for build in found))
        builds.add_metric(["running"], sum(build.running for build in found))
        yield builds
        sessions = GaugeMetricFamily(
            "offload_sessions", "Sessions that have not ended, by state.", labels=["state"]
        )
        counts = self._sessions.states()
        for state in sorted(map(state_name, OPEN_STATES)):
            sessions.add_metric([state], counts[state])
        yield sessions


def gateway_metrics(
    nodes: NodeRegistry,
    builds: ActiveBuilds,
    versions: Callable[[], Mapping[str, int]],
    sessions: ActiveSessions,
) -> CollectorRegistry:
    """Return the registry of one gateway; a process may have several."""
    registry = CollectorRegistry()
    registry.register(GatewayGauges(nodes, builds, versions, sessions))
    return registry


def _state(node: AttachedNode) -> str:
    return "draining" if node.heartbeat.draining else "ready"


def _is_behind(node: AttachedNode, newest: Mapping[str, int]) -> bool:
    beat = node.heartbeat
    return bool(beat.egress_problem) or dict(beat.egress_versions) != dict(newest)

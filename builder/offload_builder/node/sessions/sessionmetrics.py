"""What a node counts of its sessions for Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from offload_builder.node.sessions.session import state_word

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from offload_builder.node.sessions.nodesessions import NodeSessions

_STATES = ("starting", "running", "paused", "stopping")


class SessionMetrics(Collector):
    """Of all sessions of a node."""

    def __init__(self, sessions: NodeSessions) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics (prometheus_client's Collector)."""
        here = self._sessions.open_sessions()
        states = Counter(state_word(session.state) for session in here)
        found = GaugeMetricFamily(
            "offload_sessions", "Sessions that are open, by state.", labels=["state"]
        )
        for state in _STATES:
            found.add_metric([state], states[state])
        yield found
        yield GaugeMetricFamily(
            "offload_session_containers",
            "Containers that run in sessions.",
            value=sum(session.containers for session in here),
        )
        carried = Counter(self._sessions.bytes_before)
        for session in here:
            carried.update(received=session.received_bytes, sent=session.sent_bytes)
        traffic = CounterMetricFamily(
            "offload_session_bytes", "Bytes from and to clients of sessions.", labels=["direction"]
        )
        for direction in ("received", "sent"):
            traffic.add_metric([direction], carried[direction])
        yield traffic
        ends = CounterMetricFamily(
            "offload_sessions_ended", "Sessions that are over, by how.", labels=["state"]
        )
        for state in ("ended", "failed"):
            ends.add_metric([state], self._sessions.ends[state])
        yield ends

"""Which node gets a connection of a client that speaks BuildKit's API.

The client says only its project, in the TLS server name. What it will ask is not known yet: builds
wait at the node for a slot there, everything else is answered at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.gateway.scheduler import rank_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_builder.gateway.scheduler import NodeView


def choose_node(
    project_id: str, nodes: Sequence[NodeView], waiting: Mapping[str, int] | None = None
) -> str:
    """Return the node for a new connection; empty when no node can take one.

    The project's own first node, whose caches are warm, as long as it has a free slot for which no
    build of another connection waits; then the next ones in the project's order; when there is
    none, the one with the least load per slot, where builds that wait there count as well: a build
    of the new connection would have its place behind them. A node that drains gets no new
    connection.

    Args:
        project_id: as the server name says.
        nodes: that serve BuildKit's API.
        waiting: builds that wait for one node only, by node.
    """
    usable = {node.node_id: node for node in nodes if not node.draining and node.serves(project_id)}
    order = rank_nodes(project_id, frozenset(usable))

    def wanted(node_id: str) -> int:
        return usable[node_id].load + (waiting or {}).get(node_id, 0)

    for node_id in order:
        if wanted(node_id) < usable[node_id].slots:
            return node_id

    def fullness(node_id: str) -> float:
        return wanted(node_id) / max(1, usable[node_id].slots)

    return min(order, key=fullness, default="")

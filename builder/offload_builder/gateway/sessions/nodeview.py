"""What placing sessions needs to know of the nodes of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.sessions.placement import SessionNode, SessionWish
from offload_core.devices import MAX_NAME
from offload_core.nodelabels import MAX_LABEL, MAX_LABELS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from offload_builder.gateway.nodes import AttachedNode
    from offload_builder.gateway.sessions.active import ActiveSession
    from offload_builder.gateway.sessions.table import SessionRecord

_MAX_PROBLEM = 300


def node_view(node: AttachedNode, sessions: Sequence[ActiveSession]) -> SessionNode:
    """Return a node as it is now.

    Args:
        node: the node.
        sessions: that are at it, as far as this gateway knows.
    """
    hello, beat = node.hello, node.heartbeat
    most = hello.session_limits
    taken = {plain_line(name, MAX_NAME) for name in beat.devices_in_sessions}
    taken.update(name for session in sessions for name in session.devices_at_node())
    labels = sorted(hello.labels.items())[:MAX_LABELS]
    return SessionNode(
        node_id=node.node_id,
        slots=max(0, hello.session_slots),
        load=max(len(sessions), beat.sessions),
        draining=beat.draining,
        problem=plain_line(beat.sessions_problem, _MAX_PROBLEM).rstrip("."),
        project_ids=frozenset(node.token.project_ids),
        labels=frozenset(
            (plain_line(key, MAX_LABEL), plain_line(value, MAX_LABEL)) for key, value in labels
        ),
        devices=node.devices,
        taken=frozenset(taken),
        cpu_millis=most.cpu_millis,
        memory_bytes=most.memory_bytes,
        disk_bytes=most.disk_bytes,
    )


def wish_of(record: SessionRecord, avoid: Collection[str] = ()) -> SessionWish:
    """Return what a session needs of its node."""
    spec = record.wish
    return SessionWish(
        project_id=record.project_id,
        devices=tuple(spec.devices),
        gpu=spec.gpu,
        cpu_millis=spec.cpu_millis,
        memory_bytes=spec.memory_bytes,
        disk_bytes=spec.disk_bytes,
        labels=frozenset(spec.node_labels.items()),
        avoid=frozenset(avoid),
    )

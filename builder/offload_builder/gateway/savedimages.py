"""Saved images: any node of the pool can give them, with a ticket from here.

The shared store has the content, the history says which build made it and whose that was. So the
node that built it need not be there any more.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from offload_builder.gateway.scheduler import rank_nodes
from offload_proto.v1 import builds_service_pb2 as builds_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from offload_builder.gateway.history import BuildRecord
    from offload_builder.gateway.nodes import AttachedNode
    from offload_builder.gateway.tokens import TokenRecord

SIGNED_PREFIX = b"offload.v1.ImageTicket\n"
"""Keeps the signature from being valid for any other kind of message."""
TICKET_LIFETIME = timedelta(hours=6)
"""A large image takes its time on a slow line."""
SAVED_KEEP = timedelta(days=30)
"""As long as the node that built it gives a saved image."""


def may_give_image(record: BuildRecord, token: TokenRecord, now: datetime) -> bool:
    """Return whether a caller may have the saved image of a build: the member who started it."""
    return (
        record.image_saved
        and bool(record.image_digest)
        and record.state == builds_pb.BUILD_STATE_SUCCEEDED
        and record.member == token.name
        and record.completed_at is not None
        and now - record.completed_at < SAVED_KEEP
    )


def image_node(record: BuildRecord, nodes: Sequence[AttachedNode]) -> AttachedNode | None:
    """Return the node that is to give an image: one of the project's, its own comes last."""
    usable = {node.node_id: node for node in nodes if node.view(0).serves(record.project_id)}
    ranked = rank_nodes(record.project_id, frozenset(usable))
    best = sorted(
        ranked, key=lambda name: (usable[name].heartbeat.draining, name == record.node_id)
    )
    return usable[best[0]] if best else None


def image_ticket(record: BuildRecord, node_id: str, now: datetime) -> builds_pb.ImageTicket:
    """Return the right to read an image at a node."""
    ticket = builds_pb.ImageTicket(
        build_id=record.build_id,
        project_id=record.project_id,
        node_id=node_id,
        member=record.member,
        digest=record.image_digest,
    )
    ticket.expires_at.FromDatetime(now + TICKET_LIFETIME)
    return ticket


def sign_image(key: Ed25519PrivateKey, ticket: builds_pb.ImageTicket) -> builds_pb.SignedTicket:
    """Return a ticket with the signature over exactly the bytes that are sent."""
    payload = ticket.SerializeToString()
    return builds_pb.SignedTicket(payload=payload, signature=key.sign(SIGNED_PREFIX + payload))

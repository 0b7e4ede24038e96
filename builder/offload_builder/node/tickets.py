"""Build tickets at the node: verified without asking the gateway, accepted once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.message import DecodeError

from offload_core.errors import AccessDeniedError, InternalError
from offload_proto.v1.builds_service_pb2 import ImageTicket, Ticket

if TYPE_CHECKING:
    from offload_proto.v1.builds_service_pb2 import SignedTicket

SIGNATURE_CONTEXT = b"offload.v1.Ticket\n"
IMAGE_CONTEXT = b"offload.v1.ImageTicket\n"


class TicketVerifier:
    """Checks tickets of one gateway for one node."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._key: Ed25519PublicKey | None = None
        self._used: dict[str, float] = {}

    def trust(self, public_key_pem: bytes) -> None:
        """Set the gateway's key, received over the mTLS link."""
        key = load_pem_public_key(public_key_pem)
        if not isinstance(key, Ed25519PublicKey):
            raise InternalError("the gateway's ticket key is not an Ed25519 key")
        self._key = key

    def redeem(self, signed: SignedTicket, *, member: str) -> Ticket:
        """Return the ticket and mark it as used.

        Args:
            signed: as the client sent it.
            member: name in the client's certificate.

        Raises:
            AccessDeniedError: forged, expired, for another node or member, or used before.
        """
        self._verify(signed, SIGNATURE_CONTEXT, "build ticket")
        try:
            ticket = Ticket.FromString(signed.payload)
        except DecodeError:
            raise AccessDeniedError("the build ticket is not signed by this gateway") from None
        now = time.time()
        if ticket.expires_at.seconds <= now:
            raise AccessDeniedError("the build ticket has expired; start the build again")
        if ticket.node_id != self._node_id:
            raise AccessDeniedError(f"the build ticket is for node {ticket.node_id}, not this one")
        if ticket.member != member:
            raise AccessDeniedError("the build ticket belongs to another member")
        self._used = {key: until for key, until in self._used.items() if until > now}
        if ticket.build_id in self._used:
            raise AccessDeniedError("the build ticket has been used before; start the build again")
        self._used[ticket.build_id] = float(ticket.expires_at.seconds)
        return ticket

    def image(self, signed: SignedTicket, *, member: str) -> ImageTicket:
        """Return the right to a saved image; it may be used again until it expires.

        Args:
            signed: as the client sent it.
            member: name in the client's certificate.

        Raises:
            AccessDeniedError: forged, expired, or for another node or member.
        """
        self._verify(signed, IMAGE_CONTEXT, "image ticket")
        try:
            ticket = ImageTicket.FromString(signed.payload)
        except DecodeError:
            raise AccessDeniedError("the image ticket is not signed by this gateway") from None
        if ticket.expires_at.seconds <= time.time():
            raise AccessDeniedError("the image ticket has expired; start the command again")
        if ticket.node_id != self._node_id:
            raise AccessDeniedError(f"the image ticket is for node {ticket.node_id}, not this one")
        if ticket.member != member:
            raise AccessDeniedError("the image ticket belongs to another member")
        return ticket

    def _verify(self, signed: SignedTicket, context: bytes, name: str) -> None:
        if self._key is None:
            raise AccessDeniedError("this node has not yet heard from its gateway; try again")
        try:
            self._key.verify(signed.signature, context + signed.payload)
        except InvalidSignature:
            raise AccessDeniedError(f"the {name} is not signed by this gateway") from None

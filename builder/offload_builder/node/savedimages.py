"""Saved images of builds that ran at other nodes, given out of the shared store.

The gateway says with a ticket whose image it is; what the image names is read like all content of
the project. Nothing is kept of it here but what the project's own bounds keep.
"""

from __future__ import annotations

import base64
import binascii
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
from google.protobuf.message import DecodeError

from offload_builder.node.imagefiles import ImageFiles
from offload_core.errors import AccessDeniedError, NotFoundError
from offload_proto.v1.build_spec_pb2 import ImageDescriptor
from offload_proto.v1.builds_service_pb2 import BuildStats, SignedTicket
from offload_proto.v1.node_service_pb2 import Result, Success

if TYPE_CHECKING:
    from offload_builder.node.tickets import TicketVerifier
    from offload_cache.nodestore import NodeStore
    from offload_proto.v1.builds_service_pb2 import ImageTicket

log = structlog.get_logger(__name__)

TICKET_KEY = "offload-image-ticket"
"""Metadata of the calls; a serialised SignedTicket in base64."""
MAX_OPEN = 64
IDLE_SECONDS = 600.0


@dataclass
class SavedImage:
    """An image whose build ran elsewhere."""

    build_id: str
    project_id: str
    image: ImageFiles
    result: Result
    stats: BuildStats = field(default_factory=BuildStats)
    used_at: float = field(default_factory=time.monotonic)


class SavedImages:
    """Opens images for clients with a ticket, and remembers a few that are being read."""

    def __init__(self, tickets: TicketVerifier, store: NodeStore) -> None:
        self._tickets = tickets
        self._store = store
        self._open: dict[tuple[str, str], SavedImage] = {}

    async def open(self, text: str, build_id: str, *, member: str) -> SavedImage:
        """Return the image that a ticket is for.

        Args:
            text: the metadata `TICKET_KEY`.
            build_id: that the call names.
            member: name in the client's certificate.

        Raises:
            AccessDeniedError: forged, expired, or for another node, member or build.
            NotFoundError: the shared store does not have the image any more.
        """
        try:
            signed = SignedTicket.FromString(base64.b64decode(text, validate=True))
        except (binascii.Error, DecodeError, ValueError):
            raise AccessDeniedError("the image ticket cannot be read") from None
        ticket = self._tickets.image(signed, member=member)
        if ticket.build_id != build_id:
            raise AccessDeniedError("the image ticket is for another build")
        key = ticket.project_id, ticket.digest
        found = self._open.get(key)
        if found is None or found.build_id != build_id:
            found = await self._opened(ticket)
        found.used_at = time.monotonic()
        self._open.pop(key, None)
        self._open[key] = found
        self._forget_old()
        return found

    async def _opened(self, ticket: ImageTicket) -> SavedImage:
        cache = await self._store.project(ticket.project_id)
        image = ImageFiles(cache.store)
        try:
            media_type = await image.admit(ticket.digest)
        except NotFoundError:
            raise NotFoundError(
                f"the shared store does not have the image of build {ticket.build_id} any more",
                hint="build it again",
            ) from None
        size = image.size(ticket.digest)
        descriptor = ImageDescriptor(digest=ticket.digest, media_type=media_type, size_bytes=size)
        log.info(
            "image.saved.opened",
            build_id=ticket.build_id,
            project_id=ticket.project_id,
            digest=ticket.digest,
        )
        result = Result(success=Success(image=descriptor))
        return SavedImage(ticket.build_id, ticket.project_id, image, result)

    def _forget_old(self) -> None:
        """Let go of the longest unused."""
        limit = time.monotonic() - IDLE_SECONDS
        for key, image in list(self._open.items()):
            if len(self._open) <= MAX_OPEN and image.used_at >= limit:
                break
            del self._open[key]

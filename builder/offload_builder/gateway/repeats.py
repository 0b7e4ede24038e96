"""Builds that repeat others which were lost with their nodes.

The gateway repeats nothing itself: what a build is made from, and who may pay for it, only its
client knows. It links the two records, so that who looks for one finds the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from offload_builder.gateway.history import BuildRecord, History
    from offload_builder.gateway.tokens import TokenRecord
    from offload_proto.v1.builds_service_pb2 import CreateRequest

log = structlog.get_logger(__name__)


async def lost_build(
    history: History, request: CreateRequest, token: TokenRecord
) -> BuildRecord | None:
    """Return the build that a request says it repeats; None when it is not one of the caller's.

    A link that cannot be made is no reason to refuse a build.
    """
    if not request.repeat_of:
        return None
    record = await history.find(request.repeat_of)
    wanted = (request.project_id, token.name)
    if record is None or (record.project_id, record.member) != wanted:
        log.warning("build.repeat.unknown", repeat_of=request.repeat_of[:40], member=token.name)
        return None
    return record

"""`offload.v1.SessionSyncService`: thin, the work is in `desk` and in worker processes."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from offload_proto.v1.session_sync_service_pb2_grpc import SessionSyncServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from offload_builder.node.sessions.sync.desk import SyncDesk, SyncPlace
    from offload_proto.v1.session_sync_service_pb2 import SyncRequest, SyncResponse


class SessionSyncService(SessionSyncServiceServicer):
    """Synchronised directories of sessions."""

    def __init__(self, desk: SyncDesk, find: Callable[[Any], Awaitable[SyncPlace]]) -> None:
        """Prepare.

        Args:
            desk: has the processes.
            find: returns the place of the session that a call is about, given its context. It
                raises `AccessDeniedError`, `NotFoundError`, and `NodeLostError` while the session
                is paused; clients come back then.
        """
        self._desk = desk
        self._find = find

    async def Sync(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[SyncRequest], context: Any
    ) -> AsyncIterator[SyncResponse]:
        """Keep a directory and its copy the same; see the .proto file."""
        place = await self._find(context)
        async with aclosing(self._desk.sync(place, aiter(request_iterator))) as responses:
            async for response in responses:
                yield response

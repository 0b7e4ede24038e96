"""`offload.v1.SessionSyncService`: thin, the work is in `desk` and in worker processes."""

from __future__ import annotations

from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

from offload_proto.v1.session_sync_service_pb2_grpc import SessionSyncServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from offload_builder.node.sessions.calls import SessionCall
    from offload_builder.node.sessions.sync.desk import SyncDesk, SyncPlace
    from offload_proto.v1.session_sync_service_pb2 import SyncRequest, SyncResponse


class SessionSyncService(SessionSyncServiceServicer):
    """Synchronised directories of sessions."""

    def __init__(
        self,
        desk: SyncDesk,
        find: Callable[[Any], AbstractAsyncContextManager[tuple[SyncPlace, SessionCall]]],
    ) -> None:
        """Prepare.

        Args:
            desk: has the processes.
            find: gives the place of the session that a call is about, given its context, and the
                call, while the context is open. It raises `NotFoundError`, and `NodeLostError`
                while the session is paused; clients come back then.
        """
        self._desk = desk
        self._find = find

    async def Sync(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[SyncRequest], context: Any
    ) -> AsyncIterator[SyncResponse]:
        """Keep a directory and its copy the same; see the .proto file."""
        async with AsyncExitStack() as stack:
            place, call = await stack.enter_async_context(self._find(context))
            responses = await stack.enter_async_context(
                aclosing(self._desk.sync(place, aiter(request_iterator)))
            )
            while (response := await call.unless_ended(_next(responses))) is not None:
                yield response


async def _next(responses: AsyncIterator[SyncResponse]) -> SyncResponse | None:
    return await anext(responses, None)

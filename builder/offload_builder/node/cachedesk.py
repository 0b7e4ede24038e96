"""Work on the layer cache that the gateway asks for: one handler per kind of task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_core.errors import InternalError, OffloadError, UsageError
from offload_proto.v1.nodes_service_pb2 import CacheTaskReply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_proto.v1.nodes_service_pb2 import CacheTask

    Handler = Callable[[CacheTask], Awaitable[CacheTaskReply]]

log = structlog.get_logger(__name__)


class CacheDesk:
    """Finds the handler of a task; belongs to the event loop."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def register(self, kind: str, handler: Handler) -> None:
        """Set who answers a kind of task.

        Args:
            kind: name of the field in `CacheTask.task`: "usage", "prune", "promote" or "why".
            handler: returns the answer without its task_id, or raises an `OffloadError`.
        """
        self._handlers[kind] = handler

    async def answer(self, task: CacheTask) -> CacheTaskReply:
        """Do what a task asks for; what goes wrong is in the answer."""
        kind = task.WhichOneof("task") or ""
        try:
            handler = self._handlers.get(kind)
            if handler is None:
                raise UsageError(f'this node cannot answer "{kind or "this task"}" about the cache')
            reply = await handler(task)
        except OffloadError as error:
            reply = CacheTaskReply(error=error.message, error_reason=error.reason)
        except Exception as error:
            log.error("cache.task.failed", kind=kind, project_id=task.project_id, exc_info=error)
            reply = CacheTaskReply(
                error="the node failed at this task; its log says why",
                error_reason=InternalError.reason,
            )
        reply.task_id = task.task_id
        return reply

"""What the gateway asks of sessions: start, stop, wake, share; each task is answered once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import structlog

from offload_builder.node.sessions.contract import SessionPlace
from offload_core.aio import TaskSet
from offload_core.errors import InternalError, OffloadError, UsageError
from offload_proto.v1.nodes_service_pb2 import AttachRequest, SessionTaskReply

if TYPE_CHECKING:
    from offload_builder.node.sessions.nodesessions import NodeSessions
    from offload_proto.v1.nodes_service_pb2 import AttachResponse, SessionTask

log = structlog.get_logger(__name__)

STARTS = 4
"""Engines that are made at once; more would only slow each other down."""
MAX_TASKS = 256
"""That are worked on or wait; more are refused."""
_MAX_ID = 64


class Replies(Protocol):
    """The way back to the gateway."""

    async def send(self, message: AttachRequest) -> bool:
        """Send a message over the stream that is open now; False where there is none."""


class SessionTasks:
    """Takes tasks from the stream of the gateway; belongs to the event loop."""

    def __init__(self, sessions: NodeSessions, replies: Replies) -> None:
        self._sessions = sessions
        self._replies = replies
        self._starts = asyncio.Semaphore(STARTS)
        self._tasks = TaskSet()
        self._open = 0

    async def close(self) -> None:
        """Work on nothing more."""
        await self._tasks.close()

    def take_message(self, message: AttachResponse) -> None:
        """Begin to work on a task."""
        task = message.session_task
        self._tasks.start(self._answer(task), name=f"session.task.{task.task_id}")

    async def _answer(self, task: SessionTask) -> None:
        self._open += 1
        try:
            reply = await self._reply(task)
        finally:
            self._open -= 1
        reply.task_id = task.task_id
        if not await self._replies.send(AttachRequest(session_task_reply=reply)):
            # The gateway learns how things are when it is attached to again.
            log.info("session.task.unanswered", session_id=task.session_id)
        elif reply.HasField("started"):
            # What was told of it before the answer was of a session that begins.
            self._sessions.tell(task.session_id)

    async def _reply(self, task: SessionTask) -> SessionTaskReply:
        kind = task.WhichOneof("task") or ""
        reply = SessionTaskReply()
        try:
            if self._open > MAX_TASKS:
                raise InternalError(f"the node works on {MAX_TASKS} tasks of sessions already")
            await self._do(kind, task, reply)
        except OffloadError as error:
            log.info(
                "session.task.refused", kind=kind, session_id=task.session_id, reason=error.message
            )
            return SessionTaskReply(error=error.message, error_reason=error.reason)
        except Exception as error:
            log.error("session.task.broken", kind=kind, session_id=task.session_id, exc_info=error)
            return SessionTaskReply(
                error="the node failed at this task; its log says why",
                error_reason=InternalError.reason,
            )
        return reply

    async def _do(self, kind: str, task: SessionTask, reply: SessionTaskReply) -> None:
        session_id = task.session_id
        if not (session_id.isascii() and session_id.isalnum()) or len(session_id) > _MAX_ID:
            raise UsageError("a session is named by letters and digits")
        if kind == "start":
            start = task.start
            place = SessionPlace(
                session_id, start.project_id, start.owner, start.role, start.trust_domain
            )
            async with self._starts:
                session = await self._sessions.start(place, start.spec)
            reply.started.CopyFrom(session.started())
        elif kind == "stop":
            await self._sessions.stop(session_id, task.stop.reason)
        elif kind == "wake":
            await self._sessions.wake(self._sessions.of(session_id))
        elif kind == "share":
            self._sessions.share(session_id, list(task.share.members))
        else:
            raise UsageError(f'this node cannot do "{kind or "this"}" with a session')

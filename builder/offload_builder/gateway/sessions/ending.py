"""Ends sessions: because somebody says so, or because their owner may not have them any more."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.nodetasks import ask_session
from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.sessions.table import ENDED, STOPPING
from offload_core.aio import TaskSet
from offload_core.errors import BuildCanceledError, NodeLostError, OffloadError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.gateway.members import Members
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.sessions.active import ActiveSession, ActiveSessions
    from offload_builder.gateway.sessions.table import SessionRecord

log = structlog.get_logger(__name__)

POLL_SECONDS = 5.0
"""How soon the gateway finds what a command beside it has written; also when it asks again."""
STOP_SECONDS = 60.0
"""How long a node may take to remove everything of a session."""
MAX_REASON = 300


class SessionEnding:
    """Ends sessions at their nodes, again and again until it is done. Belongs to the event loop."""

    def __init__(self, sessions: ActiveSessions, nodes: NodeRegistry, members: Members) -> None:
        self._sessions = sessions
        self._nodes = nodes
        self._members = members
        self._open: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskSet(self._failed)

    async def stop(self, session: ActiveSession, reason: str) -> None:
        """End a session; return when nothing of it is left.

        Raises:
            OffloadError: its node does not answer, or fails; it is asked again by itself.
        """
        # A caller that goes away leaves the work to go on.
        await asyncio.shield(self._begin(session, reason))

    def stop_soon(self, session: ActiveSession, reason: str) -> None:
        """End a session; failures are logged and tried again."""
        self._begin(session, reason)

    def _begin(self, session: ActiveSession, reason: str) -> asyncio.Task[None]:
        known = self._open.get(session.session_id)
        if known is not None:
            return known
        task = self._tasks.start(self._stop(session, reason), name=session.session_id)
        self._open[session.session_id] = task
        task.add_done_callback(lambda _: self._open.pop(session.session_id, None))
        return task

    async def _stop(self, session: ActiveSession, reason: str) -> None:
        record = session.record
        reason = record.stop_reason or plain_line(reason, MAX_REASON)
        if session.queued:
            record.stop_reason = reason
            error = BuildCanceledError(f'the session "{record.name}" was ended: {reason}')
            self._sessions.end(session, ENDED, reason, error)
            return
        if not record.open:
            return
        if record.state != STOPPING or not record.stop_reason:
            self._sessions.change(session, state=STOPPING, stop_reason=reason)
        node = self._nodes.find(record.node_id)
        if node is None or node.connection is None:
            raise NodeLostError(
                f"node {record.node_id} is away; the session ends as soon as the node is back"
            )
        task = nodes_pb.SessionTask(session_id=session.session_id)
        task.stop.reason = reason
        await ask_session(node, task, STOP_SECONDS)
        self._sessions.end(session, ENDED, reason)

    def drop(self, node: AttachedNode, session_id: str, reason: str) -> None:
        """Tell a node to remove a session that should not be there."""
        log.info("session.dropped", session_id=session_id, node_id=node.node_id, reason=reason)
        task = nodes_pb.SessionTask(session_id=session_id)
        task.stop.reason = reason
        node.post(nodes_pb.AttachResponse(session_task=task))

    def stop_token(self, token_id: str, why: str) -> None:
        """End the sessions that were started with a token."""
        self._stop_where(lambda record: record.token_id == token_id, why)

    def tokens(self) -> set[str]:
        """Return the tokens behind sessions that have not ended."""
        return {session.record.token_id for session in self._sessions.all()}

    def _stop_where(self, wanted: Callable[[SessionRecord], bool], why: str) -> None:
        for session in self._sessions.all():
            if wanted(session.record) and not session.record.stop_reason:
                self.stop_soon(session, why)

    async def run(self) -> None:
        """Find what is to end, and ask again for what has not, until cancelled."""
        try:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                try:
                    await self._look()
                except OffloadError as error:
                    log.error("session.ending.failed", exc_info=error)
        finally:
            await self._tasks.close()

    async def _look(self) -> None:
        for session_id, reason in (await self._sessions.table.marked()).items():
            session = self._sessions.find(session_id)
            if session is not None:
                self._resume(session, reason)
        projects = {project.project_id for project in await self._members.list_projects()}
        self._stop_where(
            lambda record: record.project_id not in projects, "its project does not exist any more"
        )

    def _resume(self, session: ActiveSession, reason: str) -> None:
        """Ask again where there is somebody to ask."""
        node = self._nodes.find(session.record.node_id)
        fresh = not session.record.stop_reason
        if fresh or (node is not None and node.connection is not None):
            self.stop_soon(session, reason)

    def _failed(self, name: str, error: BaseException) -> None:
        if isinstance(error, OffloadError):
            log.warning("session.stop.pending", session_id=name, reason=error.message)
        else:
            log.error("session.stop.failed", session_id=name, exc_info=error)

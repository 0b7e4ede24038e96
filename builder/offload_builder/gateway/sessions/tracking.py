"""What nodes say about sessions, and what their silence means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.sessions.table import (
    ENDED,
    FINAL_STATES,
    LOST,
    PAUSED,
    QUEUED,
    RUNNING,
    STARTING,
    STOPPING,
    SessionRecord,
)
from offload_core.sparselog import SparseLog
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.nodes import AttachedNode
    from offload_builder.gateway.sessions.active import ActiveSession, ActiveSessions
    from offload_builder.gateway.sessions.ending import SessionEnding
    from offload_builder.gateway.sessions.queue import SessionQueue

log = structlog.get_logger(__name__)
refusals = SparseLog(log)

LATE_NEWS_SECONDS = 5.0
"""How long a node that is back may take to say how a session ended that it does not have."""
MAX_REASON = 300
_ALIVE = (RUNNING, PAUSED, STOPPING)


class SessionTracking:
    """Follows sessions that are at nodes. Belongs to the event loop.

    Args:
        sessions: that have not ended.
        queue: where those go back to that no node has made.
        ending: ends those that should not be.
        restart_grace: seconds in which nodes may come back after a restart of the gateway.
    """

    def __init__(
        self,
        sessions: ActiveSessions,
        queue: SessionQueue,
        ending: SessionEnding,
        restart_grace: float,
    ) -> None:
        self._sessions = sessions
        self._queue = queue
        self._ending = ending
        self._restart_grace = restart_grace

    async def restore(self) -> None:
        """Take up what a former gateway process left.

        Sessions at nodes are kept if their node comes back with them, those in the queue if their
        client repeats its request.
        """
        for record in await self._sessions.table.open():
            session = self._sessions.add(record)
            if session.queued:
                self._queue.readmit(session)
                continue
            session.written = True
            session.delivered = record.state != STARTING
            why = f"the gateway restarted and node {record.node_id} did not come back"
            session.grace.start(self._restart_grace, self._lose, session, why)

    async def greet(self, node: AttachedNode) -> None:
        """Compare the sessions of a node that has just attached with those that it should have."""
        told = {item.session_id: item for item in node.hello.sessions}
        for session in self._sessions.at_node(node.node_id):
            item = told.pop(session.session_id, None)
            if session.record.stop_reason:
                self._ending.stop_soon(session, session.record.stop_reason)
            elif session.record.state == STARTING:
                self._never_made(session, node)
            elif item is None:
                why = f"node {node.node_id} came back without it"
                session.grace.start(LATE_NEWS_SECONDS, self._lose, session, why)
            else:
                self._take(session, item)
                post_share(node, session.record)
        for item in told.values():
            await self._unknown(node, item)
        self._queue.wake()

    def _never_made(self, session: ActiveSession, node: AttachedNode) -> None:
        """Begin anew with a session whose node was asked by a gateway process of before."""
        if session.making:
            # The one who waits for the answer learns that the connection broke.
            return
        self._ending.drop(node, session.session_id, "nobody waits for its start any more")
        session.grace.stop()
        self._again(session)

    def _again(self, session: ActiveSession) -> None:
        self._queue.requeue(session)
        self._queue.readmit(session)

    async def updated(self, node: AttachedNode, update: nodes_pb.SessionUpdate) -> None:
        """Take in news of a session."""
        session = self._sessions.find(update.session_id)
        if session is None:
            await self._unknown(node, update)
        elif session.record.node_id != node.node_id:
            refusals.warning(
                "session.update.refused", session_id=session.session_id, node_id=node.node_id
            )
        else:
            self._take(session, update)

    def _take(self, session: ActiveSession, update: nodes_pb.SessionUpdate) -> None:
        record = session.record
        if record.state == STARTING:
            # The answer to the task that makes it says what it has got.
            return
        session.grace.stop()
        self._sessions.note_time(session, _milliseconds(update), _activity(update))
        if update.state == ENDED:
            self._end(session, update)
        elif update.state in _ALIVE and update.state != record.state and not record.stop_reason:
            self._sessions.change(
                session,
                state=update.state,
                reason=plain_line(update.reason, MAX_REASON),
                used_milliseconds=record.used_milliseconds,
                activity=record.activity,
            )
            self._queue.wake()

    def _end(self, session: ActiveSession, update: nodes_pb.SessionUpdate) -> None:
        reason = session.record.stop_reason or plain_line(update.reason, MAX_REASON)
        self._sessions.end(session, ENDED, reason or "its node has ended it")

    async def _unknown(self, node: AttachedNode, update: nodes_pb.SessionUpdate) -> None:
        """Complete the record of a session that is over, or say that nobody wants it."""
        record = await self._sessions.table.find(update.session_id[:16])
        active = self._sessions.find(update.session_id)
        if active is not None and active.record.node_id == node.node_id:
            return
        ended = update.state in FINAL_STATES
        if active is not None:
            if not ended:
                where = active.record.node_id
                why = f"the session is at node {where}" if where else "the session waits again"
                self._ending.drop(node, update.session_id, why)
        elif record is None:
            if not ended:
                self._ending.drop(node, update.session_id, "the gateway does not know it")
        elif record.node_id != node.node_id:
            refusals.warning(
                "session.update.refused", session_id=record.session_id, node_id=node.node_id
            )
        elif record.state == LOST and ended:
            used = max(record.used_milliseconds, _milliseconds(update))
            reason = record.stop_reason or plain_line(update.reason, MAX_REASON)
            self._sessions.table.change(
                record.session_id, state=ENDED, reason=reason, used_milliseconds=used
            )
        elif not ended:
            self._back(node, record, update)

    def _back(
        self, node: AttachedNode, record: SessionRecord, update: nodes_pb.SessionUpdate
    ) -> None:
        """Take up a lost session again; clients talk to nodes directly, it may have gone on."""
        taken = self._sessions.find_name(record.project_id, record.owner, record.name)
        whole = update.state in _ALIVE and record.state == LOST
        if not whole or record.stop_reason or taken is not None:
            self._ending.drop(node, record.session_id, "the session has ended already")
            return
        log.info("session.revived", session_id=record.session_id, node_id=node.node_id)
        session = self._sessions.add(record)
        session.written = session.delivered = True
        self._sessions.change(session, state=update.state, ended_at=None, reason="")
        self._take(session, update)
        post_share(node, record)

    def node_lost(self, node_id: str, why: str) -> None:
        """Give up the sessions of a lost node."""
        for session in self._sessions.at_node(node_id):
            self._lose(session, f"node {node_id} was lost: {why}")

    def node_changed(self, node_id: str) -> None:  # noqa: ARG002
        """Look at the queue when a node can do more, or less, than before."""
        self._queue.wake()

    def _lose(self, session: ActiveSession, why: str) -> None:
        if session.making:
            # The one who waits for the answer learns of it, and tries another node.
            return
        if session.record.state == STARTING:
            self._again(session)
        elif session.record.state != QUEUED:
            self._sessions.end(session, LOST, why)


def post_share(node: AttachedNode, record: SessionRecord) -> None:
    """Tell a node who may use a session, without waiting: a change may have missed it."""
    task = nodes_pb.SessionTask(session_id=record.session_id)
    task.share.members.extend(record.shared_with)
    node.post(nodes_pb.AttachResponse(session_task=task))


def _milliseconds(update: nodes_pb.SessionUpdate) -> int:
    return max(0, update.used.ToMilliseconds())


def _activity(update: nodes_pb.SessionUpdate) -> bytes:
    return update.activity.SerializeToString() if update.HasField("activity") else b""

"""Asking one node to make one session, and what its answer means."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import structlog

from offload_builder.gateway.nodetasks import ask_session
from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.sessions.table import RUNNING, STARTING
from offload_builder.gateway.tokens import role_name
from offload_core.aio import TaskSet
from offload_core.devices import MAX_NAME
from offload_core.errors import InternalError, NodeLostError, OffloadError, QuotaExceededError
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from offload_builder.gateway.nodes import AttachedNode
    from offload_builder.gateway.sessions.active import ActiveSession, ActiveSessions
    from offload_builder.gateway.sessions.cost import Rates

log = structlog.get_logger(__name__)

BUSY_SECONDS = 2.0
"""For how long a node that had no room for a session is not asked again for it."""
MAX_SESSION_DEVICES = 64
_NAME = "make-session-"


class Queue(Protocol):
    """Where sessions wait."""

    def requeue(self, session: ActiveSession) -> None:
        """Let a session wait again."""

    def wake(self) -> None:
        """Look at the sessions that wait soon."""


class SessionMaker:
    """The nodes that make sessions now. Belongs to the event loop.

    Args:
        timeout: seconds that a node may take.
        sessions: that have not ended.
        rates: what they cost.
        queue: where those wait again that a node could not make.
    """

    def __init__(
        self,
        timeout: float,
        sessions: ActiveSessions,
        rates: Rates,
        queue: Queue,
    ) -> None:
        self._timeout = timeout
        self._sessions = sessions
        self._rates = rates
        self._queue = queue
        self._tasks = TaskSet(self._failed)

    def make(self, session: ActiveSession, node: AttachedNode, picked: tuple[str, ...]) -> None:
        """Ask a node; its slot and the devices count as taken from now on."""
        session.picked = picked
        session.making = True
        session.position, session.waits_for = 0, ""
        self._sessions.change(session, state=STARTING, node_id=node.node_id)
        self._tasks.start(self._make(session, node), name=f"{_NAME}{session.session_id}")

    async def close(self) -> None:
        """Give up on all answers; the sessions are looked at again after a restart."""
        await self._tasks.close()

    async def _make(self, session: ActiveSession, node: AttachedNode) -> None:
        record = session.record
        task = nodes_pb.SessionTask(session_id=record.session_id)
        task.start.project_id = record.project_id
        task.start.owner = record.owner
        task.start.role = role_name(record.role)
        task.start.spec.CopyFrom(record.wish)
        task.start.trust_domain = record.trust_domain
        try:
            if any(item.session_id == record.session_id for item in node.hello.sessions):
                # Made for a former start, whose answer has not arrived.
                await self._remove(session, node)
            reply = await ask_session(node, task, self._timeout)
            if not reply.HasField("started"):
                raise InternalError(f"node {node.node_id} does not say what it has made")
        except OffloadError as error:
            session.making = False
            self._not_made(session, node, error)
        else:
            session.making = False
            if record.state == STARTING and record.node_id == node.node_id:
                self._made(session, node, reply.started)

    async def _remove(self, session: ActiveSession, node: AttachedNode) -> None:
        task = nodes_pb.SessionTask(session_id=session.session_id)
        task.stop.reason = "it is made anew"
        await ask_session(node, task, self._timeout)

    def _made(
        self, session: ActiveSession, node: AttachedNode, made: nodes_pb.StartedSession
    ) -> None:
        devices = tuple(plain_line(name, MAX_NAME) for name in made.devices[:MAX_SESSION_DEVICES])
        known = [device.name for device in node.devices]
        session.queue_limit.stop()
        self._sessions.change(
            session,
            state=RUNNING,
            ready_at=datetime.now(UTC),
            limits=made.limits.SerializeToString(),
            devices=devices,
            engine_version=plain_line(made.engine_version, 40),
            currency=self._rates.currency,
            micros_per_hour=self._rates.per_hour(devices, known),
            reason="",
        )

    def _not_made(self, session: ActiveSession, node: AttachedNode, error: OffloadError) -> None:
        log.warning(
            "session.not_made",
            session_id=session.session_id,
            node_id=node.node_id,
            reason=error.message,
        )
        # It may be half made, or be made later; there is nobody for whom.
        stop = nodes_pb.SessionTask(session_id=session.session_id)
        stop.stop.reason = "the gateway gave it up"
        node.post(nodes_pb.AttachResponse(session_task=stop))
        if session.record.state != STARTING or session.record.node_id != node.node_id:
            return
        if isinstance(error, QuotaExceededError):
            session.busy.add(node.node_id)
            loop = asyncio.get_running_loop()
            loop.call_later(BUSY_SECONDS, self._ask_again, session, node.node_id)
        else:
            session.failed[node.node_id] = error
        self._queue.requeue(session)

    def _ask_again(self, session: ActiveSession, node_id: str) -> None:
        session.busy.discard(node_id)
        self._queue.wake()

    def _failed(self, name: str, error: BaseException) -> None:
        log.error("session.making.failed", session=name, exc_info=error)
        session = self._sessions.find(name.removeprefix(_NAME))
        if session is not None and session.record.state == STARTING:
            session.making = False
            session.failed[session.record.node_id] = InternalError(
                "the gateway failed at the answer of the node; see its log"
            )
            self._queue.requeue(session)


def last_failure(session: ActiveSession) -> OffloadError:
    """Return why no node could make a session: what the last one said."""
    node_id, error = list(session.failed.items())[-1]
    others = len(session.failed) - 1
    tried = "" if not others else f", and {others} more could not either"
    cls = NodeLostError if isinstance(error, InternalError) else type(error)
    return cls(f"node {node_id} could not make the session{tried}: {error.message}",
               hint=error.hint)  # fmt: skip

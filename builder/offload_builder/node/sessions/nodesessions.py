"""The sessions of a node: made, paused when nobody uses them, woken, ended, and never forgotten."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.sessions.calls import NodeCalls
from offload_builder.node.sessions.contract import EngineSpec
from offload_builder.node.sessions.lifetime import Lifetime
from offload_builder.node.sessions.limits import duration, free_disk
from offload_builder.node.sessions.records import SessionRecord, SessionRecords
from offload_builder.node.sessions.reporting import Reporting
from offload_builder.node.sessions.reservations import Reservations
from offload_builder.node.sessions.session import OPEN, NodeSession, state_word
from offload_builder.node.sessions.upkeep import Upkeep
from offload_core.aio import TaskSet, finish
from offload_core.errors import NodeLostError, NotFoundError, OffloadError, QuotaExceededError
from offload_proto.v1.nodes_service_pb2 import SessionUpdate
from offload_proto.v1.sessions_service_pb2 import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.config import NodeConfig
    from offload_builder.node.sessions.contract import (
        EngineHost,
        KeptCopies,
        KeptModels,
        OpenEngineDoor,
        SessionNetworks,
        SessionPlace,
    )
    from offload_builder.node.sessions.limits import SessionBounds
    from offload_builder.node.sessions.reporting import SessionReports
    from offload_proto.v1.nodes_service_pb2 import Heartbeat, Hello, NodeDevices
    from offload_proto.v1.sessions_service_pb2 import SessionSpec

log = structlog.get_logger(__name__)

START_SECONDS = 60.0
REMOVE_SECONDS = 60.0
REMOVE_TRIES = 3
KEEP_SECONDS = 300.0
"""For model files that are new, at the end of a session that was not paused before."""
TELL_SECONDS = 15.0
"""At least so often the gateway hears of each session."""
RECORD_SECONDS = 60.0
"""So much of the time that counts may be lost with the node."""
STOPPING = "the node stops"
RESTARTED = "the node was restarted"
NO_SESSION = "there is no session {} of yours on this node, or it has ended"


class NodeSessions:
    """Of one node; an async context manager that ends all of them. Belongs to the event loop.

    Args:
        config: of the node.
        bounds: of its sessions.
        host: makes engines; None where there can be none.
        networks: of engines.
        open_door: makes what stands between members and an engine.
        models: that sessions leave to the next ones.
        copies: of members' directories in sessions.
        reports: the way to the gateway.
        devices: returns what devices the node has; None while that is not known.
        problem: why there can be no sessions here; empty when there can.

    Attributes:
        problem: one sentence; empty for none.
    """

    def __init__(
        self,
        config: NodeConfig,
        bounds: SessionBounds,
        host: EngineHost | None,
        networks: SessionNetworks,
        open_door: OpenEngineDoor,
        models: KeptModels,
        copies: KeptCopies,
        reports: SessionReports,
        devices: Callable[[], NodeDevices | None],
        *,
        problem: str = "",
    ) -> None:
        self.problem = problem
        self._config = config
        self._host = host
        self._open_door = open_door
        self._models = models
        self._copies = copies
        self._reporting = Reporting(reports)
        self._devices = devices
        self._networks = networks
        self.bounds = bounds
        slots = config.session_slots if host is not None else 0
        self._slots = slots
        self.reserved = Reservations(slots, self.bounds.memory_all)
        self._records = SessionRecords(config.data / "session-records")
        self._sessions: dict[str, NodeSession] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._upkeep: dict[str, Upkeep] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._node_calls = NodeCalls()
        self._tasks = TaskSet(_crashed)
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self.bytes_before: Counter[str] = Counter()
        """Of sessions that have ended, "received" and "sent"."""
        self.ends: Counter[str] = Counter()
        """How sessions have ended, by state."""

    async def __aenter__(self) -> Self:
        for record in await asyncio.to_thread(self._records.take_all):
            # What was theirs has gone, or goes when engines of before are removed.
            log.warning("session.lost", session_id=record.session_id, reason=RESTARTED)
            self._reporting.over(
                SessionUpdate(
                    session_id=record.session_id,
                    state=SessionState.SESSION_STATE_ENDED,
                    reason=RESTARTED,
                    used=duration(record.used_seconds),
                )
            )
        if self._slots:
            self._tasks.start(self._tell_all(), name="sessions.tell")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._draining = True
        await finish(self._end_all(STOPPING), REMOVE_SECONDS)
        self._reporting.close()
        await self._tasks.close()

    # What the gateway is told.

    def introduce(self, hello: Hello) -> None:
        """Add what there is of sessions to the node's introduction."""
        hello.session_slots = self._slots
        if self._slots:
            hello.session_limits.CopyFrom(self.bounds.most(self._free_disk()).message())
        hello.sessions.extend(session.update() for session in self._sessions.values())
        hello.sessions.extend(self._reporting.ended())

    def describe(self, beat: Heartbeat) -> None:
        """Add what there is of sessions to a heartbeat."""
        beat.sessions = len(self._sessions)
        beat.sessions_problem = self.problem
        beat.devices_in_sessions.extend(self.reserved.devices())

    async def _tell_all(self) -> None:
        loop = asyncio.get_running_loop()
        written = loop.time()
        while True:
            await asyncio.sleep(TELL_SECONDS)
            write = loop.time() - written >= RECORD_SECONDS
            if write:
                written = loop.time()
            for session in self.open_sessions():
                if session.engine is None:
                    continue
                with contextlib.suppress(OSError):
                    session.disk_bytes = await asyncio.to_thread(session.engine.disk_used)
                    if write and session.state in OPEN:
                        await asyncio.to_thread(self._records.write, _record(session))
                self._reporting.tell(session)

    def tell(self, session_id: str) -> None:
        """Tell the gateway of a session now, if it is here."""
        if (session := self._sessions.get(session_id)) is not None:
            self._reporting.tell(session)

    # Who is here.

    def open_sessions(self) -> list[NodeSession]:
        """Return the sessions that are here."""
        return list(self._sessions.values())

    def find(self, session_id: str, member: str) -> NodeSession:
        """Return a session for a member who may use it.

        Raises:
            NotFoundError: there is none, or it is not theirs; which of the two is not told.
        """
        session = self._sessions.get(session_id)
        if session is None or not session.may_use(member):
            raise NotFoundError(NO_SESSION.format(session_id[:64]))
        return session

    def of(self, session_id: str) -> NodeSession:
        """Return a session, for the gateway.

        Raises:
            NotFoundError: it is not here.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFoundError(f"there is no session {session_id} on this node")
        return session

    def share(self, session_id: str, members: list[str]) -> None:
        """Say anew who may use a session beside its owner.

        Raises:
            NotFoundError: there is no such session.
        """
        self.of(session_id).share(members)
        log.info("session.shared", session_id=session_id, members=members)

    # Begin.

    async def start(self, place: SessionPlace, spec: SessionSpec) -> NodeSession:
        """Make a session; the same session again is waited for.

        Raises:
            InvalidValueError: it wants more than any session has here.
            DeviceUnavailableError: it wants a device that the node does not have.
            QuotaExceededError: there is no room for it.
            NodeLostError: its engine does not start, or it was stopped meanwhile.
        """
        session = self._sessions.get(place.session_id)
        if session is None:
            session = self._admit(place, spec)
            making = self._tasks.start(self._make(session), name=f"session.{place.session_id}")
            self._making[place.session_id] = making
        making_now = self._making.get(place.session_id)
        if making_now is not None:
            await asyncio.wait((making_now,))
            if making_now.cancelled():
                raise NodeLostError("the session was stopped while its engine was made")
            making_now.result()
        return session

    def _admit(self, place: SessionPlace, spec: SessionSpec) -> NodeSession:
        if self._host is None or self.problem:
            raise QuotaExceededError(self.problem or "this node takes no sessions")
        if self._draining:
            raise QuotaExceededError("the node is draining")
        self.reserved.check_slot()
        free = self._free_disk()
        limits = self.bounds.give(spec)
        devices = self.reserved.choose(spec.devices, gpu=spec.gpu, found=self._devices())
        self.reserved.take(place.session_id, limits.engine, devices, free_disk=free)
        session = NodeSession(place, limits, devices, self._node_calls, self._session_changed)
        self._sessions[place.session_id] = session
        self._empty.clear()
        return session

    def _session_changed(self, session: NodeSession) -> None:
        if (upkeep := self._upkeep.get(session.session_id)) is not None:
            upkeep.changed.set()
        self._reporting.changed(session)

    def _free_disk(self) -> int:
        """Return the disk that sessions can still be given: all of them may use all of theirs."""
        promised = sum(
            max(0, session.limits.engine.disk_bytes - session.disk_bytes)
            for session in self._sessions.values()
        )
        return max(0, free_disk(self._config.data, self._config.disk_reserve) - promised)

    async def _make(self, session: NodeSession) -> None:
        place = session.place
        spec = EngineSpec(
            place.session_id, place.project_id, session.limits.engine, session.devices
        )
        started = asyncio.get_running_loop().time()
        try:
            await asyncio.to_thread(self._records.write, _record(session))
            try:
                async with asyncio.timeout(START_SECONDS):
                    engine = session.engine = await self._the_host.create(spec)
                    await self._networks.assign(engine.engine_id, place.project_id)
            except TimeoutError as error:
                raise NodeLostError(
                    f"the docker engine was not ready within {START_SECONDS:.0f} s"
                ) from error
            session.door = self._open_door(engine, place)
            await asyncio.to_thread(self._records.write, _record(session))
        except BaseException as error:
            said = error.message if isinstance(error, OffloadError) else str(error)
            log.warning("session.failed", session_id=place.session_id, reason=said)
            with contextlib.suppress(OffloadError):
                await finish(self._remove(session), REMOVE_SECONDS)
            self._gone(session, SessionState.SESSION_STATE_FAILED, said or "it was stopped")
            if isinstance(error, OSError):
                raise NodeLostError(f"the node cannot keep the session: {error}") from error
            raise
        finally:
            del self._making[place.session_id]
        session.life = Lifetime(session.limits, asyncio.get_running_loop().time())
        session.set_state(SessionState.SESSION_STATE_RUNNING)
        end = partial(self.end, session)
        upkeep = self._upkeep[place.session_id] = Upkeep(
            session, engine, self._the_host, self._models, self._copies, end
        )
        upkeep.begin()
        log.info(
            "session.started",
            session_id=place.session_id,
            project_id=place.project_id,
            member=place.owner,
            engine_id=engine.engine_id,
            devices=list(session.devices),
            seconds=asyncio.get_running_loop().time() - started,
        )

    @property
    def _the_host(self) -> EngineHost:
        if self._host is None:
            raise NodeLostError("this node takes no sessions")
        return self._host

    async def wake(self, session: NodeSession) -> None:
        """Have a session's engine answer, also where it is paused.

        Raises:
            NodeLostError: it has ended, or its engine does not start again.
        """
        upkeep = self._upkeep.get(session.session_id)
        if upkeep is None:
            raise NodeLostError("the session has not begun, or has ended")
        await upkeep.wake()

    # End.

    async def stop(self, session_id: str, reason: str) -> None:
        """End a session and wait until nothing of it is left; harmless for one that is not here.

        Raises:
            NodeLostError: something of it could not be removed.
        """
        if (session := self._sessions.get(session_id)) is not None:
            ending = self.end(session, reason or "it was stopped")
            await asyncio.wait((ending,))
            if not ending.cancelled():
                ending.result()

    def end(self, session: NodeSession, reason: str) -> asyncio.Task[None]:
        """Begin to end a session; the first reason holds."""
        ending = self._ending.get(session.session_id)
        if ending is None:
            ending = self._tasks.start(
                self._end(session, reason), name=f"session.end.{session.session_id}"
            )
            self._ending[session.session_id] = ending
        return ending

    async def _end(self, session: NodeSession, reason: str) -> None:
        session_id = session.session_id
        try:
            making = self._making.get(session_id)
            if making is not None:
                making.cancel()
                await asyncio.wait((making,))
                if session_id not in self._sessions:
                    return
            running = session.running.is_set()
            if session.life is not None:
                # Time that counts ends here.
                session.life.pause(asyncio.get_running_loop().time())
            session.set_state(SessionState.SESSION_STATE_STOPPING, reason)
            session.end_calls()
            if (upkeep := self._upkeep.pop(session_id, None)) is not None:
                await upkeep.close()
            if running and session.engine is not None and not session.containers:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_SECONDS):
                        await self._models.keep(session.engine, session.place)
            await self._copies.end(session_id)
            try:
                await self._remove(session)
            except NodeLostError as error:
                # What may still be there is nobody else's until the next start has looked.
                self._gone(session, SessionState.SESSION_STATE_ENDED, error.message, left=True)
                raise
            self._gone(session, SessionState.SESSION_STATE_ENDED, reason)
            log.info("session.ended", session_id=session_id, reason=reason)
        finally:
            self._ending.pop(session_id, None)

    async def _remove(self, session: NodeSession) -> None:
        """Remove the engine of a session.

        Raises:
            NodeLostError: that failed again and again; the next start of the node tries again.
        """
        if session.engine is None:
            return
        failure: Exception | None = None
        for _ in range(REMOVE_TRIES):
            try:
                async with asyncio.timeout(REMOVE_SECONDS):
                    await self._the_host.remove(session.engine.engine_id)
            except (OffloadError, OSError) as error:
                failure = error
                log.error(
                    "session.remove.failed",
                    session_id=session.session_id,
                    engine_id=session.engine.engine_id,
                    exc_info=error,
                )
                await asyncio.sleep(1.0)
            else:
                return
        raise NodeLostError(
            f"not everything of the session {session.session_id} could be removed; "
            "the node's log says why"
        ) from failure

    def _gone(
        self,
        session: NodeSession,
        state: SessionState.ValueType,
        reason: str,
        *,
        left: bool = False,
    ) -> None:
        session_id = session.session_id
        if session.engine is not None:
            self._models.forget(session.engine.engine_id)
        if not left:
            self.reserved.give_back(session_id)
            removing = asyncio.to_thread(self._records.remove, session_id)
            self._tasks.start(removing, name="session.record")
        self.bytes_before.update(received=session.received_bytes, sent=session.sent_bytes)
        self.ends[state_word(state)] += 1
        del self._sessions[session_id]
        session.set_state(state, reason)
        if state == SessionState.SESSION_STATE_ENDED:
            # Who has asked for one that could not be made hears so in the answer.
            self._reporting.over(session.update())
        if not self._sessions:
            self._empty.set()

    async def _end_all(self, reason: str) -> None:
        endings = [self.end(session, reason) for session in self.open_sessions()]
        if endings:
            await asyncio.wait(endings)

    async def drain(self, timeout: float) -> None:
        """Take nothing more; give those who use a session some time, then end all.

        Args:
            timeout: seconds for sessions that are in use; the others end at once.
        """
        self._draining = True
        for session in self.open_sessions():
            if session.life is not None and session.life.in_use and timeout > 0:
                session.warn(f"the node stops; this session ends within {timeout:.0f} s")
            else:
                self.end(session, STOPPING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        await self._end_all(STOPPING)


def _record(session: NodeSession) -> SessionRecord:
    return SessionRecord(
        session.session_id,
        session.place.project_id,
        session.place.owner,
        session.engine.engine_id if session.engine is not None else "",
        session.used_seconds(),
    )


def _crashed(name: str, error: BaseException) -> None:
    if isinstance(error, OffloadError):
        # Whoever waits has heard it.
        log.debug("session.task.failed", task=name, error=error.message)
    else:
        log.error("session.task.failed", task=name, exc_info=error)

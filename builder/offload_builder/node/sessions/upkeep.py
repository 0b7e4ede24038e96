"""Looks after one session: watches its engine, pauses it when it is not used, and wakes it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.sessions.enginewatch import running_containers, watch_containers
from offload_builder.node.sessions.lifetime import Due
from offload_builder.node.sessions.session import OVER
from offload_core.aio import TaskSet, finish
from offload_core.errors import NodeLostError, OffloadError
from offload_proto.v1.sessions_service_pb2 import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.sessions.contract import Engine, EngineHost, KeptCopies, KeptModels
    from offload_builder.node.sessions.lifetime import Lifetime
    from offload_builder.node.sessions.session import NodeSession

log = structlog.get_logger(__name__)

NOT_YET_SECONDS = 15.0
"""After an engine did not say whether it is in use."""
CLOSE_SECONDS = 30.0
_BREATH_SECONDS = 0.01
IDLE = "it was not used"
TIME_OVER = "its time is over"


class Upkeep:
    """Of one session whose engine has answered; belongs to the event loop.

    Args:
        session: the session, with a life.
        engine: of it.
        host: of the engine.
        models: that the session leaves to the next ones.
        copies: of members' directories in the session.
        end: begins to end the session, with a reason.

    Attributes:
        changed: set whenever something about the session is new.
    """

    def __init__(
        self,
        session: NodeSession,
        engine: Engine,
        host: EngineHost,
        models: KeptModels,
        copies: KeptCopies,
        end: Callable[[str], object],
    ) -> None:
        if session.life is None:
            raise ValueError("the session has not begun")
        self.changed = asyncio.Event()
        self._session = session
        self._life: Lifetime = session.life
        self._engine = engine
        self._host = host
        self._models = models
        self._copies = copies
        self._end = end
        self._tasks = TaskSet(_crashed)
        self._turn = asyncio.Lock()
        """Held while the engine is paused or woken."""
        self._watching: asyncio.Task[None] | None = None
        self._waking: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look after it from now on."""
        self._watch()
        self._tasks.start(self._live(), name=f"session.life.{self._session.session_id}")

    async def close(self) -> None:
        """Leave the session alone; its engine is as it is."""
        await finish(self._tasks.close(CLOSE_SECONDS), CLOSE_SECONDS)

    def _watch(self) -> None:
        name = f"session.engine.{self._session.session_id}"
        self._watching = self._tasks.start(self._watch_engine(), name=name)

    async def _watch_engine(self) -> None:
        """Hear of containers, and of the engine's death, while it runs."""
        ended = self._engine.ended
        watching = asyncio.ensure_future(
            watch_containers(self._engine, self._session.set_containers)
        )
        try:
            await asyncio.wait((ended, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            await asyncio.wait((watching,))
        if ended.done() and not ended.cancelled():
            # The lines after the first are of its log, which is for administrators.
            self._end(f"its docker engine ended: {ended.result().partition(chr(10))[0]}")
        elif not watching.cancelled():
            watching.result()

    async def _live(self) -> None:
        """Do what is due, and say before what will be."""
        loop = asyncio.get_running_loop()
        not_before = 0.0
        while self._session.state not in OVER:
            self.changed.clear()
            due = self._life.due(loop.time())
            if due in (Due.END, Due.REMOVE):
                self._end(TIME_OVER if due is Due.END else IDLE)
                return
            if due is Due.PAUSE and loop.time() >= not_before and not await self._pause():
                not_before = loop.time() + NOT_YET_SECONDS
            if warning := self._life.warning(loop.time()):
                self._session.warn(warning)
            now = loop.time()
            until = self._life.next_look(now)
            if until <= now:
                until = max(now, not_before)
            elif not_before > now:
                until = min(until, not_before)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(_BREATH_SECONDS, until - now)):
                    await self.changed.wait()

    async def _pause(self) -> bool:
        """Pause the session; False when that cannot be said to be right now."""
        session, life = self._session, self._life
        async with self._turn:
            if session.state != SessionState.SESSION_STATE_RUNNING:
                return True
            try:
                # Its events may be late, or their stream broken.
                session.set_containers(await running_containers(self._engine))
                if life.due(asyncio.get_running_loop().time()) is Due.PAUSE:
                    await self._models.keep(self._engine, session.place)
            except OffloadError as error:
                log.warning(
                    "session.pause.unsure", session_id=session.session_id, cause=error.message
                )
                return False
            now = asyncio.get_running_loop().time()
            if life.due(now) is not Due.PAUSE:
                return True
            # From here on calls wait for the engine to be woken, with no await in between.
            life.pause(now)
            session.set_state(SessionState.SESSION_STATE_PAUSED)
            session.calls.end(NodeLostError("the session is paused"))
            session.dialer.close()
            if self._watching is not None:
                self._watching.cancel()
                await asyncio.wait((self._watching,))
            await self._copies.end(session.session_id)
            try:
                await self._host.pause(self._engine)
            except OffloadError as error:
                self._end(f"it could not be paused: {error.message}")
                return True
        log.info("session.paused", session_id=session.session_id)
        return True

    async def wake(self) -> None:
        """Have the engine answer; all who wait for it wait for the same.

        Raises:
            NodeLostError: the session has ended, or its engine does not start again.
        """
        session = self._session
        if session.state == SessionState.SESSION_STATE_RUNNING:
            return
        if session.state != SessionState.SESSION_STATE_PAUSED:
            raise NodeLostError(f"the session has ended: {session.reason}")
        waking = self._waking
        if waking is None or waking.done():
            name = f"session.wake.{session.session_id}"
            waking = self._waking = self._tasks.start(self._wake(), name=name)
        await asyncio.wait((waking,))
        if waking.cancelled():
            raise NodeLostError(f"the session has ended: {session.reason}")
        waking.result()

    async def _wake(self) -> None:
        session = self._session
        async with self._turn:
            if session.state != SessionState.SESSION_STATE_PAUSED:
                return
            try:
                await self._host.wake(self._engine)
            except OffloadError as error:
                self._end(f"its docker engine did not start again: {error.message}")
                raise
            self._life.wake(asyncio.get_running_loop().time())
            session.set_containers(0)
            session.set_state(SessionState.SESSION_STATE_RUNNING)
            self._watch()
        log.info("session.woken", session_id=session.session_id)


def _crashed(name: str, error: BaseException) -> None:
    if isinstance(error, OffloadError):
        # Whoever waits has heard it.
        log.debug("session.task.failed", task=name, error=error.message)
    else:
        log.error("session.task.failed", task=name, exc_info=error)

"""One session at its node: its state, who may use it, what it does, and what is told of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from offload_builder.node.sessions.calls import OpenCalls
from offload_builder.node.sessions.dialing import PortDialer
from offload_builder.node.sessions.limits import duration
from offload_core.errors import AccessDeniedError, NodeLostError
from offload_proto.v1.nodes_service_pb2 import SessionUpdate, StartedSession
from offload_proto.v1.session_node_service_pb2 import SessionNews
from offload_proto.v1.sessions_service_pb2 import SessionActivity, SessionState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from offload_builder.node.sessions.calls import NodeCalls
    from offload_builder.node.sessions.contract import Engine, EngineDoor, SessionPlace
    from offload_builder.node.sessions.lifetime import Lifetime
    from offload_builder.node.sessions.limits import GivenLimits

NEWS_SECONDS = 15.0
"""A follower that hears nothing for longer takes the connection for lost."""
_GATHER_SECONDS = 0.1
"""Changes of what a session does are told together; those of its state at once."""
_WARNINGS_KEPT = 8
UNSHARED = "this session is not shared with you any more"
OVER = (
    SessionState.SESSION_STATE_ENDED,
    SessionState.SESSION_STATE_LOST,
    SessionState.SESSION_STATE_FAILED,
)


OPEN = (SessionState.SESSION_STATE_RUNNING, SessionState.SESSION_STATE_PAUSED)


class NodeSession:
    """A session from when it is asked for until nothing of it is left; belongs to the event loop.

    Attributes:
        place: whose it is.
        limits: what it has got.
        devices: fully qualified.
        state: where it is in its life.
        reason: why it ended, or ends; empty before.
        engine: None until it answers.
        life: None until its engine answers.
        calls: that are open.
        dialer: to its ports.
        containers: that run.
        disk_bytes: that it has on the node's disk.
    """

    def __init__(
        self,
        place: SessionPlace,
        limits: GivenLimits,
        devices: tuple[str, ...],
        node_calls: NodeCalls,
        changed: Callable[[NodeSession], None],
    ) -> None:
        self.place = place
        self.limits = limits
        self.devices = devices
        self.state: SessionState.ValueType = SessionState.SESSION_STATE_STARTING
        self.reason = ""
        self.engine: Engine | None = None
        self.door: EngineDoor | None = None
        self.life: Lifetime | None = None
        self.calls = OpenCalls(node_calls, self._use_changed)
        self.dialer = PortDialer()
        self.containers = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.disk_bytes = 0
        self.running = asyncio.Event()
        """Its engine answers."""
        self.over = asyncio.Event()
        self._shared: frozenset[str] = frozenset()
        self._changed = changed
        self._warnings: deque[tuple[int, str]] = deque(maxlen=_WARNINGS_KEPT)
        self._said = 0
        self._news = asyncio.Event()
        self.followers = 0

    @property
    def session_id(self) -> str:
        """Its identifier."""
        return self.place.session_id

    # Who may.

    def may_use(self, member: str) -> bool:
        """Return whether a member may use it."""
        return member == self.place.owner or member in self._shared

    def share(self, members: Iterable[str]) -> None:
        """Say anew who may use it beside its owner; open calls of others are ended."""
        self._shared = frozenset(members)
        self.calls.end(
            AccessDeniedError(UNSHARED),
            of=lambda member: not self.may_use(member),
        )
        self.tell()

    # What it does.

    def set_state(self, state: SessionState.ValueType, reason: str = "") -> None:
        """Be somewhere else in its life from now on."""
        self.state = state
        self.reason = reason or self.reason
        if state == SessionState.SESSION_STATE_RUNNING:
            self.running.set()
        else:
            self.running.clear()
        if state in OVER:
            self.over.set()
        self._changed(self)
        self.tell()

    def end_calls(self) -> None:
        """End all calls, because the session ends."""
        self.calls.end(NodeLostError(f"the session has ended: {self.reason}"))
        self.dialer.close()

    def set_containers(self, count: int) -> None:
        """Hear how many containers run."""
        if count != self.containers:
            self.containers = count
            self._use_changed()

    def carried(self, received: int, sent: int) -> None:
        """Hear of bytes from a client, and to it."""
        self.received_bytes += received
        self.sent_bytes += sent

    def _use_changed(self) -> None:
        if self.life is not None:
            in_use = bool(self.containers or self.calls.counting)
            self.life.use(asyncio.get_running_loop().time(), in_use=in_use)
        self._changed(self)
        self.tell()

    def used_seconds(self) -> float:
        """Return the time that counts."""
        now = asyncio.get_running_loop().time()
        return self.life.used(now) if self.life is not None else 0.0

    # What is told.

    def activity(self) -> SessionActivity:
        """Return what it does now."""
        activity = SessionActivity(
            running_containers=self.containers,
            open_connections=self.calls.counting,
            received_bytes=self.received_bytes,
            sent_bytes=self.sent_bytes,
            disk_bytes=self.disk_bytes,
        )
        if self.life is not None and self.state in OPEN:
            if (pauses_at := self.life.pauses_at) is not None:
                activity.pauses_at.FromDatetime(_wall(pauses_at))
            if (removed_at := self.life.removed_at) is not None:
                activity.removed_at.FromDatetime(_wall(removed_at))
        return activity

    def update(self) -> SessionUpdate:
        """Return what the gateway hears."""
        return SessionUpdate(
            session_id=self.session_id,
            state=self.state,
            reason=self.reason,
            activity=self.activity(),
            used=duration(self.used_seconds()),
        )

    def started(self) -> StartedSession:
        """Return what the gateway hears once the engine answers."""
        return StartedSession(
            limits=self.limits.message(),
            devices=self.devices,
            engine_version=self.engine.version if self.engine is not None else "",
        )

    def warn(self, sentence: str) -> None:
        """Have its people read a sentence."""
        self._said += 1
        self._warnings.append((self._said, sentence))
        self.tell()

    def tell(self) -> None:
        """Have followers hear the news."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, member: str) -> AsyncGenerator[SessionNews, None]:
        """Yield the news at once, at every change and at least every `NEWS_SECONDS`.

        The last one says that the session is over.

        Raises:
            AccessDeniedError: the member may use it no more.
        """
        heard = self._said
        self.followers += 1
        try:
            while True:
                if not self.may_use(member):
                    raise AccessDeniedError(UNSHARED)
                changed, warning, state = self._news, "", self.state
                for number, sentence in self._warnings:
                    if number > heard:
                        heard, warning = number, sentence
                        break
                yield self._message(warning)
                if state in OVER:
                    return
                if heard == self._said and state == self.state:
                    try:
                        async with asyncio.timeout(NEWS_SECONDS):
                            await changed.wait()
                    except TimeoutError:
                        continue
                    if heard == self._said and state == self.state:
                        await asyncio.sleep(_GATHER_SECONDS)
        finally:
            self.followers -= 1

    def _message(self, warning: str) -> SessionNews:
        news = SessionNews(
            state=self.state, activity=self.activity(), warning=warning, reason=self.reason
        )
        if self.life is not None and self.state not in OVER:
            left = self.life.ends_at - asyncio.get_running_loop().time()
            news.remaining.CopyFrom(duration(left))
        return news


def state_word(state: SessionState.ValueType) -> str:
    """Return a state as logs and metrics have it, for example "running"."""
    return SessionState.Name(state).removeprefix("SESSION_STATE_").lower()


def _wall(at: float) -> datetime:
    """Return a time of the event loop as one of the calendar."""
    ahead = at - asyncio.get_running_loop().time()
    return datetime.fromtimestamp(time.time() + ahead, UTC)

"""The tunnel to a session's node: kept up, and found again when it breaks.

Calls for single connections end with the network; containers go on without them. The tunnel comes
back by itself: at the node's last place, or where the gateway says.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, Any, Self

import grpc

from offload_client.sessions.access import GONE, NodeChannel, SessionPlace
from offload_client.sessions.backoff import BackOff
from offload_client.sessions.nodestream import NodeStream, PortStream, Traffic, node_error
from offload_core.aio import TaskSet, finish
from offload_core.errors import (
    NodeLostError,
    NotFoundError,
    OffloadError,
    SessionGoneError,
)
from offload_core.pieces import read_piece, write_piece, write_port_request
from offload_core.sessionmetadata import SESSION_KEY, UNATTENDED_KEY
from offload_core.versions import call_metadata
from offload_proto.v1 import session_node_service_pb2 as pb
from offload_proto.v1.session_node_service_pb2_grpc import SessionNodeServiceStub
from offload_proto.v1.sessions_service_pb2 import SESSION_STATE_PAUSED, SessionState

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable
    from types import TracebackType

    from grpc import aio

    from offload_client.sessions.access import SessionAccess

_SERVICE = pb.DESCRIPTOR.services_by_name["SessionNodeService"].full_name
SPARES = 3
"""Connections to the engine that are open before anybody needs them."""
REFILL_SECONDS = 0.05
PATIENCE_SECONDS = 10.0
"""How long a new connection waits for a tunnel that is away, from when it went away."""
LEAST_PATIENCE = 1.0
NEWS_SECONDS = 60.0
"""The node sends news every 20 s."""
FRESH_SECONDS = 300.0
"""Before the end of a certificate, a connection is made with the next one."""
DIAGNOSE_SECONDS = 30.0


class _Line:
    """A connection to the node: kept until its last stream has ended."""

    def __init__(self, channel: NodeChannel, access: SessionAccess) -> None:
        self.channel = channel
        self.stub: Any = SessionNodeServiceStub(channel.channel)
        # Beside the stub's own methods: pieces come and go without protobuf.
        self.engine = self._streams_of("Engine", write_piece)
        self.port = self._streams_of("Port", write_port_request)
        self.datagrams = self._streams_of("Datagrams", write_port_request)
        self._access = access
        self._streams = 0
        self._retired = False

    def _streams_of(self, method: str, write: Callable[[Any], bytes]) -> Any:
        path = f"/{_SERVICE}/{method}"
        return self.channel.channel.stream_stream(path, write, read_piece)

    def track(self, stream: NodeStream) -> None:
        """Count a stream."""
        self._streams += 1
        stream.when_done(self._one_ended)

    def retire(self) -> None:
        """Take no more streams."""
        self._retired = True
        self._give_up_unused()

    def _one_ended(self) -> None:
        self._streams -= 1
        self._give_up_unused()

    def _give_up_unused(self) -> None:
        if self._retired and self._streams == 0:
            self._access.give_up(self.channel)


class Tunnel:
    """Streams to one session; a context manager."""

    def __init__(
        self, access: SessionAccess, session_id: str, log: logging.Logger, *, spares: int = SPARES
    ) -> None:
        """Prepare.

        Args:
            access: the way to the session.
            session_id: at the gateway.
            log: hears of breaks.
            spares: connections to the engine that are kept open.
        """
        self.traffic = Traffic()
        self.news: pb.SessionNews | None = None
        """The latest."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done with a sentence when the session is no more."""
        self.reconnecting_since: float | None = time.time()
        """Seconds since 1970 UTC; None while it is up."""
        self.problem = ""
        """Why it is not up, in one sentence."""
        self._away_since = time.monotonic()
        self._listeners: list[Callable[[], None]] = []
        self._access = access
        self._metadata = call_metadata((SESSION_KEY, session_id))
        self._log = log
        self._wanted_spares = spares
        self._spares: list[NodeStream] = []
        self._line: _Line | None = None
        self._place: SessionPlace | None = None
        self._refilling: asyncio.TimerHandle | None = None
        self._up = asyncio.Event()
        self._waking: asyncio.Future[None] | None = None
        self._back_off = BackOff()
        self._tasks = TaskSet(on_error=self._failed)

    async def __aenter__(self) -> Self:
        self._tasks.start(self._keep_up(), name="tunnel")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await finish(self._tasks.close(), 6)
        self._line = None
        if self._refilling is not None:
            self._refilling.cancel()
        await self._drop_spares()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call a function at all news, and whenever the tunnel is up again."""
        self._listeners.append(listener)

    @property
    def paused(self) -> bool:
        """Whether the session's engine is stopped."""
        return self.news is not None and self.news.state == SESSION_STATE_PAUSED

    @property
    def away_seconds(self) -> float:
        """For how long it is not up; the sleep of this machine and changes of its clock aside."""
        return 0.0 if self._up.is_set() else time.monotonic() - self._away_since

    async def engine(self, *, wake: bool = True) -> NodeStream:
        """Return a new connection to the engine.

        Args:
            wake: somebody wants it: start the engine of a paused session. Else that is an error,
                and what the connection carries keeps no session from being paused.

        Raises:
            OffloadError: the session is gone, or its node cannot be reached.
        """
        line = await self._ready()
        if self.paused:
            if not wake:
                raise NodeLostError("the session is paused")
            await self._wake()
            line = await self._ready()
        if not wake:
            # It says at its beginning what it is for; spare ones have begun.
            return self._open_engine(line, (UNATTENDED_KEY, "1"))
        while self._spares:
            spare = self._spares.pop(0)
            if not spare.done:
                self._refill_soon()
                return spare
        self._refill_soon()
        return self._open_engine(line)

    async def port(self, port: int, host: str = "") -> PortStream:
        """Return a new connection to a TCP port of the session.

        Raises:
            OffloadError: the session is gone, or its node cannot be reached.
        """
        line = await self._ready()
        return await self._open_port(line, line.port, port, host)

    async def datagrams(self, port: int, host: str = "") -> PortStream:
        """Return a new peer of a UDP port of the session; pieces are datagrams.

        Raises:
            OffloadError: the session is gone, or its node cannot be reached.
        """
        line = await self._ready()
        return await self._open_port(line, line.datagrams, port, host)

    async def channel(self) -> tuple[aio.Channel, tuple[tuple[str, str], ...]]:
        """Return the connection of now, and the metadata that calls for the session have.

        Calls on it end when the tunnel breaks; whoever makes them makes them again.

        Raises:
            OffloadError: the session is gone, or its node cannot be reached.
        """
        line = await self._ready()
        return line.channel.channel, self._metadata

    async def diagnose(self) -> dict[str, str]:
        """Return what the node says about the engine, by its parts.

        Raises:
            OffloadError: the session is gone, or its node cannot be reached.
        """
        line = await self._ready()
        try:
            reply = await line.stub.Diagnose(
                pb.DiagnoseRequest(), metadata=self._metadata, timeout=DIAGNOSE_SECONDS
            )
        except grpc.RpcError as error:
            raise node_error(error) from error
        return dict(reply.texts)

    def _open_engine(self, line: _Line, *extra: tuple[str, str]) -> NodeStream:
        stream = NodeStream(line.engine(metadata=(*self._metadata, *extra)), self.traffic)
        line.track(stream)
        return stream

    async def _open_port(self, line: _Line, method: Any, port: int, host: str) -> PortStream:
        stream = PortStream(method(metadata=self._metadata), self.traffic)
        line.track(stream)
        try:
            await stream.open(pb.PortOpen(port=port, host=host))
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def _ready(self) -> _Line:
        """Return the connection of a tunnel that is up; waits a while for it."""
        patience = max(LEAST_PATIENCE, PATIENCE_SECONDS - self.away_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._up.wait()
        if self.ended.done():
            raise SessionGoneError(self.ended.result(), hint="run 'offload start'")
        if self._line is None:
            raise NodeLostError(
                f"the session cannot be reached: {self.problem or 'its node does not answer'}",
                hint="it is tried again all the time; see 'offload status'",
            )
        return self._line

    async def _wake(self) -> None:
        """Have the engine started again; all who need it wait for the same."""
        if self._waking is None or self._waking.done():
            self._waking = self._tasks.start(self._wake_once(), name="wake")
        await asyncio.wait((self._waking,))
        self._waking.result()

    async def _wake_once(self) -> None:
        self._place = await self._access.find(wake=True)
        if self.news is not None and self.paused:
            # The node says so too, a moment later.
            self.news.state = SessionState.ValueType(self._place.state)

    async def _keep_up(self) -> None:
        while not self.ended.done():
            started = time.monotonic()
            try:
                await self._hold()
                continue
            except SessionGoneError as error:
                self._end(error.message)
                return
            except OffloadError as error:
                self.problem = error.message
                self._log.info("the tunnel is away: %s", error.message)
                if isinstance(error, NotFoundError):
                    # The node does not know it; the gateway knows why.
                    self._place = None
            except Exception as error:  # noqa: BLE001 - else nobody would try again
                self.problem = f"internal error: {error!r}"
                self._log.exception("the tunnel is away")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Of a call whose channel was closed.
                self.problem = "its connection was closed"
            self._down()
            rest = self._back_off.after(time.monotonic() - started)
            await asyncio.sleep(rest * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    async def _hold(self) -> None:
        """Connect, and follow the session until the connection ends or has to be renewed."""
        known = self._place
        if known is None:
            self._place = known = await self._access.find(wake=False)
        try:
            channel = await self._access.connect(known)
        except NodeLostError:
            # Perhaps it is elsewhere; whoever has ended it says so too.
            self._place = None
            self._place = known = await self._access.find(wake=False)
            channel = await self._access.connect(known)
        line = _Line(channel, self._access)
        try:
            await self._follow(line)
        finally:
            # Spare streams are nobody's; those in use go on for as long as they can.
            self._down()
            line.retire()

    async def _follow(self, line: _Line) -> None:
        call = line.stub.Follow(pb.FollowRequest(), metadata=self._metadata)
        renew_at = max(line.channel.expires_at - FRESH_SECONDS, time.time() + NEWS_SECONDS)
        try:
            while time.time() < renew_at:
                async with asyncio.timeout(NEWS_SECONDS):
                    news = await call.read()
                if news is grpc.aio.EOF:
                    raise NodeLostError("the node has ended the connection")
                self._heard(news, line)
                if self.ended.done():
                    return
        except TimeoutError as error:
            raise NodeLostError("nothing is heard of the session's node") from error
        except grpc.RpcError as error:
            raise node_error(error) from error
        finally:
            call.cancel()

    def _heard(self, news: pb.SessionNews, line: _Line) -> None:
        self.news = news
        if news.state in GONE:
            self._end(news.reason or "the session has ended")
            return
        if self._line is not line:
            self._line = line
            self.reconnecting_since = None
            self.problem = ""
            self._back_off.reached()
            self._up.set()
            self._log.info("the tunnel is up")
        self._refill()
        self._tell()

    def _refill_soon(self) -> None:
        """Open spare connections once the command that took the last one has had its turn."""
        if self._refilling is None:
            self._refilling = asyncio.get_running_loop().call_later(REFILL_SECONDS, self._refill)

    def _refill(self) -> None:
        """Open spare connections where some are missing."""
        if self._refilling is not None:
            self._refilling.cancel()
            self._refilling = None
        if self._line is None or self.paused:
            return
        self._spares = [spare for spare in self._spares if not spare.done]
        while len(self._spares) < self._wanted_spares:
            self._spares.append(self._open_engine(self._line))

    def _down(self) -> None:
        if self._up.is_set() and not self.ended.done():
            self._up.clear()
            self.reconnecting_since = time.time()
            self._away_since = time.monotonic()
        self._line = None
        self._tasks.start(self._drop_spares(), name="spares")
        self._tell()

    async def _drop_spares(self) -> None:
        spares, self._spares = self._spares, []
        for spare in spares:
            await spare.aclose()

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self._log.info("the session has ended: %s", reason)
            self.ended.set_result(reason)
            # Whoever waits for it hears why it does not come.
            self._up.set()
            self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, OffloadError):
            self._log.error("%s failed: %r", name, error)

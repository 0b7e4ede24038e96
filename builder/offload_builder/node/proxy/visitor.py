"""One connection of a BuildKit client: who it is, and what becomes of each of its calls."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.controlapi import status_ref
from offload_builder.buildkit.frontendcall import BUILD_ID
from offload_builder.buildkit.h2.client import UnixConnection
from offload_builder.buildkit.h2.limits import Budget
from offload_builder.buildkit.h2.messages import (
    CANCELLED,
    INTERNAL,
    NOT_FOUND,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    GrpcError,
    message_prefix,
)
from offload_builder.buildkit.h2.server import ServerCall
from offload_builder.buildkit.h2.stream import ConnectionLostError, StreamResetError
from offload_builder.buildkit.introduction import CONTROL, LLB_BRIDGE
from offload_builder.buildkit.sessiongreeting import greet, pass_without_preface
from offload_builder.node.proxy.builds import ClientBuild, daemon_lost
from offload_builder.node.proxy.names import ALREADY_EXISTS
from offload_builder.node.proxy.records import METHODS as RECORD_METHODS
from offload_builder.node.proxy.records import PRUNE, answers, permitted
from offload_builder.node.proxy.relay import daemon_stream, relay
from offload_builder.node.proxy.solving import Solving
from offload_core.aio import TaskSet, stop
from offload_core.errors import OffloadError, find_offload_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from offload_builder.buildkit.controlapi import SolveOrder
    from offload_builder.buildkit.h2.stream import Http2Stream
    from offload_builder.buildkit.introduction import Introduction
    from offload_builder.node.project import ProjectRuntime
    from offload_builder.node.proxy.admission import Guest
    from offload_builder.node.proxy.desk import Desk

    Handler = Callable[["ServerCall", "Http2Stream"], Awaitable[None]]

log = structlog.get_logger(__name__)

RECORD_SECONDS = 1.0
"""After so long the progress of a name is looked for among the builds of before."""
ORDER_SECONDS = 10.0
"""Calls of a build may come before its Solve call; BuildKit itself waits 3 to 6 s."""
LATE_SECONDS = 10.0
"""A build that is over is known for so long, for calls that come late."""
CONNECT_SECONDS = 10.0
MAX_BUILDS = 64
MAX_PARKED_BYTES = 64 << 10
MAX_REQUEST_BYTES = 64 << 20
"""Four of the largest."""
_SESSION_ID = "x-docker-expose-session-uuid"
_CONTENT = "/containerd.services.content.v1.Content/"
_READ_ONLY_CONTENT = frozenset(_CONTENT + name for name in ("Info", "Read"))
"""Not List: who knows a digest may have the bytes, so digests are not told."""
_TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"
_FAILED_PRECONDITION = 9


class Visitor:
    """Serves the calls of one connection.

    Args:
        desk: what all connections share.
        guest: finds out who it is and whether that is still allowed.
        client_address: for the log.
        max_request_bytes: of the requests that come or wait at a time.
    """

    def __init__(
        self,
        desk: Desk,
        guest: Callable[[], Awaitable[Guest]],
        client_address: str,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self.desk = desk
        self.guest = guest
        self.client_address = client_address
        self.builds: dict[str, ClientBuild] = {}
        self.program = "buildkit"
        """What calls, as far as can be told."""
        self.queue = asyncio.Lock()
        """Held by the build that waits in the queue for all builds of this connection."""
        self._requests = Budget(max_request_bytes, desk.requests)
        self._sessions_known = asyncio.Event()
        self._tasks = TaskSet()
        self._upstreams: dict[Path, UnixConnection] = {}
        self._connecting = asyncio.Lock()
        self._preparing: asyncio.Task[None] | None = None
        self._solving = Solving(self)
        self._handlers: dict[str, Handler] = {
            f"{CONTROL}Info": self._info,
            f"{CONTROL}ListWorkers": self._workers,
            f"{CONTROL}Solve": self._solving.serve,
            f"{CONTROL}Status": self._status,
            f"{CONTROL}Session": self._session,
            f"{LLB_BRIDGE}Ping": self._ping,
            f"{LLB_BRIDGE}Return": self._return,
            f"{LLB_BRIDGE}Evaluate": self._solving.serve_evaluation,
            f"{LLB_BRIDGE}Solve": self._solving.serve_frontend,
            _HEALTH: self._health,
            _TRACES: self._traces,
        }

    def accept(self, stream: Http2Stream) -> None:
        """Serve a new call in the background."""
        metadata: dict[str, list[str]] = {}
        for name, value in stream.headers:
            metadata.setdefault(name, []).append(value)
        method = metadata.get(":path", [""])[0]
        call = ServerCall(stream, method, metadata, _nobody, self._requests)
        handler = self._handlers.get(method)
        if handler is None and method in RECORD_METHODS:
            handler = self._record
        elif handler is None and method.startswith(LLB_BRIDGE):
            handler = self._bridge
        elif handler is None and method in _READ_ONLY_CONTENT:
            handler = self._content
        if handler is None:
            call.finish(UNIMPLEMENTED, f"{method} is not offered here; see docs/buildx.md")
            return
        task = self._tasks.start(self._serve(call, stream, handler), name=f"serve {method}")
        stream.on_failure = task.cancel

    async def close(self) -> None:
        """End everything of this connection."""
        await self._tasks.close()
        for connection in self._upstreams.values():
            await connection.close()
        self._upstreams.clear()

    def leave_queue(self, error: OffloadError) -> None:
        """Refuse the builds that wait; those that run go on."""
        self._solving.leave_queue(error)

    async def _serve(self, call: ServerCall, stream: Http2Stream, handler: Handler) -> None:
        try:
            if call.method != _HEALTH:
                # Nothing is kept for somebody who may not be here.
                await self._welcome()
            await handler(call, stream)
        except asyncio.CancelledError:
            call.finish(CANCELLED, "the call was cancelled")
            raise
        except Exception as error:  # noqa: BLE001 - becomes the status of the call
            status = self.status_of(error, call.method)
            call.finish(status.code, status.message, status.details)
        else:
            call.finish(OK)

    def status_of(self, error: Exception, method: str) -> GrpcError:
        """Return what a client is told of an error."""
        if isinstance(error, GrpcError):
            return error
        known = find_offload_error(error)
        if known is not None:
            text = known.message if not known.hint else f"{known.message}; {known.hint}"
            return GrpcError(known.status_code, text)
        if isinstance(error, StreamResetError):
            code = UNAVAILABLE if isinstance(error, ConnectionLostError) else CANCELLED
            return GrpcError(code, str(error))
        log.error("buildkit.call.failed", method=method, exc_info=error)
        return GrpcError(INTERNAL, "the node failed; its log says more")

    # Answered at once.

    async def _info(self, call: ServerCall, _stream: Http2Stream) -> None:
        await call.receive_one()
        await call.send([(await self._introduction()).info])

    async def _workers(self, call: ServerCall, _stream: Http2Stream) -> None:
        await call.receive_one()
        await call.send([(await self._introduction()).workers])

    async def _introduction(self) -> Introduction:
        return await self.desk.introduction(await self.guest())

    async def _welcome(self) -> None:
        try:
            await self.guest()
        except OffloadError as error:
            status = self.status_of(error, "")
            # The first call of all clients. buildx repeats it for 20 s while it is UNAVAILABLE,
            # and shows nothing of the reason then.
            code = _FAILED_PRECONDITION if status.code == UNAVAILABLE else status.code
            raise GrpcError(code, status.message) from error

    async def _ping(self, call: ServerCall, _stream: Http2Stream) -> None:
        await call.receive()
        build = await self._build_of(call)
        if build.error is not None:
            raise build.error
        await call.send([(await self.desk.introduction(await self.guest())).pong])

    async def _health(self, call: ServerCall, _stream: Http2Stream) -> None:
        await call.receive()
        await call.send([_SERVING])

    async def _traces(self, call: ServerCall, _stream: Http2Stream) -> None:
        """Take the client's own traces: the pool has no use for them, and an error none either."""
        await call.receive()
        await call.send([b""])

    # Builds.

    def build(self, ref: str) -> ClientBuild:
        """Return the build with a name, which may not have begun.

        Raises:
            GrpcError: there are too many.
        """
        found = self.builds.get(ref)
        if found is None:
            if len(self.builds) >= MAX_BUILDS:
                raise GrpcError(
                    RESOURCE_EXHAUSTED,
                    f"one connection may have {MAX_BUILDS} builds at a time; start fewer at once",
                )
            found = self.builds[ref] = ClientBuild(ref)
        return found

    def new_build(self, order: SolveOrder) -> ClientBuild:
        """Return the build that a Solve call begins.

        Raises:
            GrpcError: there are too many, or its name was used just now.
        """
        build = self.build(order.ref)
        if build.begun.is_set():
            raise GrpcError(ALREADY_EXISTS, f"there was a build {order.ref} just now")
        build.begin(order)
        return build

    def prepare(self) -> None:
        """Hear that a build begins: what it needs is made ready while it waits for its slot."""
        if self._preparing is None or self._preparing.done():
            self._preparing = self._tasks.start(self._prepare(), name="prepare build")

    async def _prepare(self) -> None:
        # What goes wrong here is told by the build itself.
        with contextlib.suppress(OffloadError, GrpcError, OSError, sqlite3.Error):
            runtime = await self._runtime(await self.guest())
            # News of the cache that come only now cost the build an import.
            runtime.cache.offers.expect()
            if runtime.socket is not None:
                await self.upstream(runtime.socket)

    def forget_later(self, build: ClientBuild) -> None:
        """Forget a build some time after its end."""
        loop = asyncio.get_running_loop()
        loop.call_later(LATE_SECONDS, self._forget, build)

    def _forget(self, build: ClientBuild) -> None:
        if self.builds.get(build.ref) is build:
            del self.builds[build.ref]

    def changed(self) -> None:
        """Let sessions look again whether there is a build that they belong to."""
        event, self._sessions_known = self._sessions_known, asyncio.Event()
        event.set()

    async def begun(self, ref: str, patience: float = ORDER_SECONDS) -> ClientBuild:
        """Return a build whose Solve call has come, waiting some time for it.

        Raises:
            GrpcError: it has not come.
        """
        build = self.build(ref)
        if self.desk.agent.slots.draining:
            # A client that was sent away comes back for calls of a build that ends elsewhere.
            patience = 0.0
        try:
            async with asyncio.timeout(patience):
                await build.begun.wait()
        except TimeoutError:
            if not build.begun.is_set():
                self._forget(build)
            raise GrpcError(NOT_FOUND, f"there is no build {ref[:64]}") from None
        return build

    async def _build_of(self, call: ServerCall) -> ClientBuild:
        return await self.begun(call.metadata.get(BUILD_ID, [""])[0])

    async def _status(self, call: ServerCall, _stream: Http2Stream) -> None:
        request = await call.receive_one()
        try:
            build = await self.begun(status_ref(request), RECORD_SECONDS)
        except GrpcError as error:
            if error.code != NOT_FOUND:
                raise
            # A build of before, or of another connection: BuildKit has it in its history.
            await self._answer_from_daemon(call, request, await self.guest())
            return
        async with aclosing(build.feed.watch()) as runs:
            async for run in runs:
                await call.send(run)
        if build.error is not None:
            raise build.error

    async def _return(self, call: ServerCall, stream: Http2Stream) -> None:
        build = await self._build_of(call)
        if build.is_empty:
            await call.receive_one()
            build.give_back()
            await call.send([b""])
            return
        request = await call.receive_one()
        build.said.returned(stream.headers, request)
        job = await build.wait_open()
        if job.later is not None:
            job.later.returned(request)
        await self._pass_on(build, stream, request)

    async def _bridge(self, call: ServerCall, stream: Http2Stream) -> None:
        build = await self._build_of(call)
        build.said.other()
        await self._pass_on(build, stream)

    async def _pass_on(
        self, build: ClientBuild, stream: Http2Stream, request: bytes | None = None
    ) -> None:
        job = await build.wait_open()
        upstream = await self.upstream(job.socket)
        try:
            with daemon_stream(upstream.http2, stream.headers, job.trace) as daemon:
                if request is not None:
                    await daemon.write([message_prefix(len(request)), request])
                    daemon.end()
                await relay(stream, daemon, request=request is None)
        except ConnectionLostError as error:
            raise daemon_lost(await job.explain_loss(str(error))) from error

    # Sessions.

    async def _session(self, call: ServerCall, stream: Http2Stream) -> None:
        """Hold a session until a build that it serves is admitted, then pass it on."""
        session_id = call.metadata.get(_SESSION_ID, [""])[0]
        project_id = (await self.guest()).project_id
        with self.desk.session_names.claimed(project_id, session_id, self):
            await self._serve_session(session_id, call, stream)

    async def _serve_session(self, session_id: str, call: ServerCall, stream: Http2Stream) -> None:
        call.answered()
        await greet(stream)
        parked: list[bytes] = []
        reader = asyncio.ensure_future(_park(stream, parked))
        try:
            build = await self._build_with(session_id, reader)
        finally:
            await stop(reader, expected=(StreamResetError,))
        if build is None or build.job is None:
            return
        job = build.job
        upstream = await self.upstream(job.socket)
        try:
            with daemon_stream(upstream.http2, stream.headers, job.trace) as daemon:
                # One that builds share gives files only, no logins.
                proxy = job.session_proxy(stream, daemon) if build.owns(session_id) else None
                if proxy is not None:
                    await proxy.run(parked)
                    return
                if parked:
                    await daemon.write(parked)
                await pass_without_preface(daemon, stream)
                await relay(stream, daemon, answered=True)
        except ConnectionLostError as error:
            raise daemon_lost(await job.explain_loss(str(error))) from error

    async def _build_with(
        self, session_id: str, reader: asyncio.Future[None]
    ) -> ClientBuild | None:
        """Return an admitted build that a session serves; None when the client ends it before."""
        while True:
            news = asyncio.ensure_future(self._sessions_known.wait())
            try:
                for build in self.builds.values():
                    if build.serves(session_id):
                        return build
                if reader.done():
                    return None
                await asyncio.wait((news, reader), return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()

    # What the project has.

    async def _record(self, call: ServerCall, _stream: Http2Stream) -> None:
        request = await call.receive_one()
        guest = await self.guest()
        request = permitted(call.method, request, guest, self.desk.refs_of(guest))
        await self._answer_from_daemon(call, request, guest)

    async def _answer_from_daemon(self, call: ServerCall, request: bytes, guest: Guest) -> None:
        runtime = await self._runtime(guest)
        log.info(
            "buildkit.record.asked",
            method=call.method.rpartition("/")[2],
            member=guest.member,
            project_id=guest.project_id,
        )
        async with runtime.use() as client:
            if call.method == PRUNE:
                # What is gone afterwards has to be imported from then on.
                runtime.own_results.look(await client.disk_usage())
            messages = answers(
                client, call.method, request, self.desk.capabilities, self.desk.repeats
            )
            async with aclosing(messages) as stream:
                async for message in stream:
                    await call.send([message])
            if call.method == PRUNE:
                runtime.own_results.look(await client.disk_usage())

    async def _content(self, _call: ServerCall, stream: Http2Stream) -> None:
        runtime = await self._runtime(await self.guest())
        async with runtime.use() as client:
            upstream = await self.upstream(client.socket_path)
            with daemon_stream(upstream.http2, stream.headers) as daemon:
                await relay(stream, daemon)

    async def _runtime(self, guest: Guest) -> ProjectRuntime:
        return await self.desk.runtime(guest)

    async def upstream(self, socket: Path) -> UnixConnection:
        """Return this connection's own connection to a daemon.

        Raises:
            GrpcError: the daemon does not listen.
        """
        async with self._connecting:
            found = self._upstreams.get(socket)
            if found is not None and not found.http2.usable:
                if found.http2.open_streams == 0:
                    await found.close()
                found = None
            if found is None:
                try:
                    found = await UnixConnection.open(socket, CONNECT_SECONDS)
                except (OSError, TimeoutError) as error:
                    raise GrpcError(
                        UNAVAILABLE, f"the project's BuildKit does not answer: {error}"
                    ) from error
                self._upstreams[socket] = found
            return found


async def _park(stream: Http2Stream, parked: list[bytes]) -> None:
    """Collect what a client sends; ends with the stream or when there is too much."""
    size = 0
    while data := await stream.read():
        parked.append(data)
        size += len(data)
        if size > MAX_PARKED_BYTES:
            await asyncio.Event().wait()


def _nobody(_method: str, _error: Exception) -> None:
    """Hear of failures that the status of the call tells already."""

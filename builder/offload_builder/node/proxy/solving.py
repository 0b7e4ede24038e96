"""The two calls in which a client says what to build: held, changed, and sent on."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.controlapi import (
    answer_of_solve,
    exporter_response,
    frontend_attributes,
    read_order,
    rewrite_frontend_call,
    rewrite_order,
)
from offload_builder.buildkit.frontendcall import BUILD_ID
from offload_builder.buildkit.h2.messages import CANCELLED, GrpcError, MessageReader, message_prefix
from offload_builder.buildkit.h2.stream import ConnectionLostError, StreamResetError
from offload_builder.node.proxy.admission import Place
from offload_builder.node.proxy.builds import daemon_lost, shared_sessions
from offload_builder.node.proxy.policy import bounded, wish_of
from offload_builder.node.proxy.queuenote import QueueNote
from offload_builder.node.proxy.relay import answer_of, daemon_stream
from offload_builder.node.proxy.relayedjob import FeedLink, RelayedJob
from offload_core.aio import stop
from offload_core.errors import NodeLostError, OffloadError
from offload_proto.v1.node_service_pb2 import Start

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from typing import Any

    from offload_builder.buildkit.h2.connection import Http2Connection
    from offload_builder.buildkit.h2.headers import HeaderList
    from offload_builder.buildkit.h2.server import ServerCall
    from offload_builder.buildkit.h2.stream import Http2Stream
    from offload_builder.node.proxy.builds import ClientBuild
    from offload_builder.node.proxy.policy import Wish
    from offload_builder.node.proxy.visitor import Visitor
    from offload_proto.v1.builds_service_pb2 import Assigned

log = structlog.get_logger(__name__)

LEFT = "the client went away"
STOP_SECONDS = 10.0
_CACHE_NOTE = "cache.manifest"
"""What an exporter of caches reports."""


class Solving:
    """Control/Solve and LLBBridge/Solve of one connection."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor
        self._waiting: set[asyncio.Future[None]] = set()

    def leave_queue(self, error: OffloadError) -> None:
        """Refuse what waits."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)

    async def serve(self, call: ServerCall, stream: Http2Stream) -> None:
        """Serve Control/Solve."""
        request = await call.receive_one()
        order, visitor = read_order(request), self._visitor
        project_id = (await visitor.guest()).project_id
        if order.session:
            visitor.desk.session_names.check(project_id, order.session, visitor)
        self._check_sessions(project_id, order.attributes)
        with visitor.desk.build_names.claimed(project_id, order.ref, visitor):
            await self._serve(visitor.new_build(order), request, call, stream)

    def _check_sessions(self, project_id: str, attributes: Mapping[str, str]) -> None:
        """Refuse to read directories of the sessions of other connections."""
        for session_id in shared_sessions(attributes):
            self._visitor.desk.session_names.check(project_id, session_id, self._visitor)

    async def _serve(
        self, build: ClientBuild, request: bytes, call: ServerCall, stream: Http2Stream
    ) -> None:
        self._visitor.changed()
        self._visitor.prepare()
        try:
            if build.is_empty and await build.stays_empty():
                # Only buildx looks what a builder can do before it builds.
                self._visitor.program = "buildx"
                await call.send([b""])
                return
            await self._build(build, request, call, stream)
        except asyncio.CancelledError:
            build.fail(GrpcError(CANCELLED, "the build was cancelled"))
            raise
        except Exception as error:
            build.fail(self._visitor.status_of(error, call.method))
            raise
        finally:
            build.end()
            self._visitor.changed()
            self._visitor.forget_later(build)

    async def _build(
        self, build: ClientBuild, request: bytes, call: ServerCall, stream: Http2Stream
    ) -> None:
        job = await self._admitted(build, _client_name(call) or self._visitor.program)
        try:
            await self._opened(job)
            # The session has to be there within seconds of the call.
            self._visitor.changed()
            await self._solve(build, job, request, stream)
        finally:
            # First what does not wait: the client's end may cancel this a second time.
            if not job.answered:
                self._visitor.desk.agent.cancel(job.build_id, LEFT)
            if job.later is not None:
                await job.later.close()

    async def _admitted(self, build: ClientBuild, client: str) -> RelayedJob:
        """Wait for a slot, show the place in the queue, and start the build here."""
        order, visitor = build.order, self._visitor
        if order is None:
            raise NodeLostError("the build has not begun")
        guest = await visitor.guest()
        wish = wish_of(order, client)
        wish.create.project_id = guest.project_id
        wish.create.request_id = secrets.token_hex(16)
        visitor.desk.note_ref(guest, build.ref)
        with QueueNote(build.feed, build.ref) as note:
            async with visitor.queue:
                beside = self._running_beside()
                assigned = await self._assigned(wish, beside, note)
                if beside:
                    visitor.desk.agent.reserve(assigned.build_id)
                job = await visitor.desk.agent.admit(
                    Start(ticket=assigned.ticket, spec=wish.spec),
                    member=guest.member,
                    make=partial(RelayedJob, wish=wish, order=order, feed=build.feed),
                    link=FeedLink(build.feed, build.ref),
                )
                build.job = job
        return job

    def _running_beside(self) -> str:
        for other in self._visitor.builds.values():
            if other.job is not None and not other.over.is_set():
                return other.job.build_id
        return ""

    async def _assigned(self, wish: Wish, beside: str, note: QueueNote) -> Assigned:
        visitor = self._visitor
        refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(refused)
        queue = asyncio.ensure_future(self._follow_queue(wish, beside, note))
        try:
            await asyncio.wait((queue, refused), return_when=asyncio.FIRST_COMPLETED)
            if queue.done():
                return queue.result()
            refused.result()
            raise NodeLostError(f"the queue of {visitor.client_address} ended")
        finally:
            self._waiting.discard(refused)
            refused.cancel()
            await stop(queue, expected=(OffloadError,))

    async def _follow_queue(self, wish: Wish, beside: str, note: QueueNote) -> Assigned:
        visitor = self._visitor
        news = visitor.desk.gateway.admit(await visitor.guest(), wish.create, beside)
        async with aclosing(news) as places:
            async for item in places:
                if not isinstance(item, Place):
                    return item
                note.place(item.position, item.reason)
        raise NodeLostError("the gateway ended the queue without an answer")

    async def _opened(self, job: RelayedJob) -> None:
        """Wait until BuildKit and cache are open for a build."""
        await asyncio.wait((job.ready,))
        if job.ready.cancelled():
            await self._raise_end(job)

    @staticmethod
    async def _raise_end(job: RelayedJob) -> None:
        """Say why the node has ended a build."""
        async with asyncio.timeout(STOP_SECONDS):
            await job.over.wait()
        message = job.result.failure.message if job.result is not None else ""
        raise GrpcError(CANCELLED, message or "the build was ended at the node")

    async def _solve(
        self, build: ClientBuild, job: RelayedJob, request: bytes, stream: Http2Stream
    ) -> None:
        """Have BuildKit solve, again when only the cache failed; tell client and job the end."""
        order, desk = build.order, self._visitor.desk
        if order is None:
            raise NodeLostError("the build has not begun")
        attributes, again = bounded(order.attributes, desk.bounds), False
        while True:
            changed = rewrite_order(
                request,
                ref=job.ref,
                attributes=attributes,
                imports=job.imports,
                exports=job.exports,
                entitlements=job.entitlements,
                policy_session=job.policy_session,
                proxy_network=job.proxy_network,
            )
            if job.later is not None:
                job.later.begin(changed)
            upstream = await self._visitor.upstream(job.socket)
            with daemon_stream(upstream.http2, stream.headers, job.trace) as daemon:
                await daemon.write([message_prefix(len(changed)), changed])
                daemon.end()
                build.opened.set()
                saying = self._say_again(build, job, upstream.http2) if again else None
                data, error = await self._answer(job, daemon, saying)
                if error is None:
                    await self._exported_later(job)
                    await _end_well(stream, daemon, data, job)
                    return
                again = await job.failed(error, may_repeat=build.said.possible)
                if not again:
                    _end_with(stream, daemon, error, job)
                    return
                desk.note_repeat(build.ref, job.ref)

    async def _answer(
        self, job: RelayedJob, daemon: Http2Stream, saying: Coroutine[Any, Any, None] | None
    ) -> tuple[bytes, GrpcError | None]:
        """Wait for BuildKit's answer to a solve; `saying` is done meanwhile."""
        answering = asyncio.ensure_future(answer_of(daemon))
        stopping = asyncio.ensure_future(job.stopped.wait())
        waiting: set[asyncio.Future[Any]] = {answering, stopping}
        if saying is not None:
            waiting.add(asyncio.ensure_future(saying))
        try:
            while not answering.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if answering.done():
                    break
                if stopping.done():
                    await self._raise_end(job)
                for task in done:
                    task.result()
            return answering.result()
        except ConnectionLostError as lost:
            sentence = await job.explain_loss(str(lost))
            await job.failed(daemon_lost(sentence), may_repeat=False)
            raise daemon_lost(sentence) from lost
        except GrpcError as error:
            await job.failed(error, may_repeat=False)
            raise
        finally:
            expected = (StreamResetError, GrpcError, OffloadError)
            await stop(answering, *waiting, expected=expected)

    async def _exported_later(self, job: RelayedJob) -> None:
        """Wait until what is new has been exported, unless the node ends the build before."""
        if job.later is None:
            return
        exporting = asyncio.ensure_future(job.export_later())
        stopping = asyncio.ensure_future(job.stopped.wait())
        try:
            await asyncio.wait((exporting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not exporting.done():
                await self._raise_end(job)
            exporting.result()
        finally:
            await stop(exporting, stopping)

    async def _say_again(
        self, build: ClientBuild, job: RelayedJob, connection: Http2Connection
    ) -> None:
        """Be the frontend of a build once more, in the client's place."""

        async def ask(headers: HeaderList, message: bytes) -> tuple[bytes, GrpcError | None]:
            renamed = [(key, job.ref if key == BUILD_ID else value) for key, value in headers]
            with daemon_stream(connection, renamed, job.trace) as daemon:
                await daemon.write([message_prefix(len(message)), message])
                daemon.end()
                return await answer_of(daemon)

        await build.said.run(ask, partial(self._frontend_request, job))

    def _frontend_request(self, job: RelayedJob, request: bytes) -> bytes:
        return rewrite_frontend_call(
            request,
            attributes=bounded(frontend_attributes(request), self._visitor.desk.bounds),
            imports=job.imports,
        )

    async def serve_frontend(self, call: ServerCall, stream: Http2Stream) -> None:
        """Serve LLBBridge/Solve."""
        build = await self._visitor.begun(call.metadata.get(BUILD_ID, [""])[0])
        request = await call.receive_one()
        job = await build.wait_open()
        self._check_sessions(job.project_id, frontend_attributes(request))
        changed = self._frontend_request(job, request)
        upstream = await self._visitor.upstream(job.socket)
        try:
            with daemon_stream(upstream.http2, stream.headers, job.trace) as daemon:
                await daemon.write([message_prefix(len(changed)), changed])
                daemon.end()
                data, error = await answer_of(daemon)
                if error is None:
                    build.said.solved(stream.headers, request, data)
                    if job.later is not None:
                        job.later.called(changed, b"".join(MessageReader().feed(data)))
                    stream.send_headers(daemon.headers)
                    await stream.write([data])
                    stream.end(daemon.trailers)
                else:
                    build.said.other()
                    stream.end(daemon.trailers or daemon.headers)
        except ConnectionLostError as error:
            raise daemon_lost(await job.explain_loss(str(error))) from error

    async def serve_evaluation(self, call: ServerCall, stream: Http2Stream) -> None:
        """Serve LLBBridge/Evaluate, with which bake builds targets that others are based on.

        What fails there for the cache's sake only fails the solve in the end as well, and that is
        repeated. So the client is told that it worked.
        """
        build = await self._visitor.begun(call.metadata.get(BUILD_ID, [""])[0])
        request = await call.receive_one()
        job = await build.wait_open()
        upstream = await self._visitor.upstream(job.socket)
        try:
            with daemon_stream(upstream.http2, stream.headers, job.trace) as daemon:
                await daemon.write([message_prefix(len(request)), request])
                daemon.end()
                _, error = await answer_of(daemon)
        except ConnectionLostError as lost:
            raise daemon_lost(await job.explain_loss(str(lost))) from lost
        if error is not None and not (build.said.possible and job.repairs(error)):
            raise error
        await call.send([b""])


async def _end_well(stream: Http2Stream, daemon: Http2Stream, data: bytes, job: RelayedJob) -> None:
    """Tell client and job that the solve has worked."""
    notes = exporter_response(b"".join(MessageReader().feed(data)))
    job.worked(notes)
    if not job.wish.exports:
        notes.pop(_CACHE_NOTE, None)
    answer = answer_of_solve({key: job.cache.readable(text) for key, text in notes.items()})
    stream.send_headers(daemon.headers)
    await stream.write([message_prefix(len(answer)), answer])
    stream.end(daemon.trailers)


def _end_with(stream: Http2Stream, daemon: Http2Stream, error: GrpcError, job: RelayedJob) -> None:
    """End a call with BuildKit's status; all details included, unless we say more or less."""
    if (said := job.say_error(error.message)) != error.message:
        raise GrpcError(error.code, said)
    if daemon.trailers:
        stream.send_headers(daemon.headers)
        stream.end(daemon.trailers)
    else:
        stream.end(daemon.headers)


def _client_name(call: ServerCall) -> str:
    """Return the program that calls, by its user agent; empty when that names gRPC only."""
    for product in call.metadata.get("user-agent", [""])[0].split():
        name = product.partition("/")[0].lower()
        if name and not name.startswith("grpc"):
            return name[:40]
    return ""

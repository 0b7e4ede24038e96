"""One call of a client to a build: what it says is passed on, what happens is shown, in order.

The call is no more than a view: the build is the agent's and goes on without it.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

import grpc
import structlog

from offload_builder.node.clientlink import ANSWERS
from offload_builder.node.endedbuilds import EndedBuild
from offload_core.aio import finish
from offload_core.errors import NodeLostError, OffloadError, UsageError
from offload_proto.v1.node_service_pb2 import RunResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from offload_builder.node.departure import Visit
    from offload_builder.node.job import BuildJob
    from offload_proto.v1.node_service_pb2 import RunRequest

log = structlog.get_logger(__name__)

STOP_SECONDS = 15.0
IDLE_SECONDS = 600.0
"""A client that fetches nothing of a finished build for so long, and does not leave, is sent away.
Docker may unpack a large layer for minutes without reading the next one."""


class Host(Protocol):
    """What a call needs of the agent."""

    def cancel(self, build_id: str, reason: str) -> None:
        """End a build."""

    def visited(self, build: BuildJob | EndedBuild) -> None:
        """Hear that a call has ended."""


async def attend(
    host: Host,
    build: BuildJob | EndedBuild,
    visit: Visit,
    requests: AsyncIterator[RunRequest],
    resume_after: int = 0,
) -> AsyncGenerator[RunResponse]:
    """Yield what a client is told, until it leaves or is sent away.

    Args:
        host: the agent.
        build: that runs or has ended.
        visit: of the client, which has its seat already.
        requests: what it says from now on.
        resume_after: progress up to this sequence number is known.

    Raises:
        OffloadError: why the client is sent away.
    """
    outbox = visit.outbox
    listening = asyncio.ensure_future(_listen(host, build, visit, requests))
    telling = asyncio.ensure_future(_tell(build, visit, resume_after))
    telling.add_done_callback(lambda _: outbox.finish())
    if isinstance(build, EndedBuild):
        build.visits += 1
    try:
        while (message := await outbox.get()) is not None:
            yield message
        if visit.error is not None:
            raise visit.error
        if not visit.left:
            await telling
    finally:
        if isinstance(build, EndedBuild):
            build.visits -= 1
        else:
            build.seat.gone(visit)
        outbox.drop()
        for task in (listening, telling):
            task.cancel()
        try:
            await finish(asyncio.wait((listening, telling)), STOP_SECONDS)
        finally:
            if telling.done() and not telling.cancelled():
                telling.exception()
            host.visited(build)


async def _tell(build: BuildJob | EndedBuild, visit: Visit, resume_after: int) -> None:
    async with aclosing(build.journal.read(resume_after)) as runs:
        async for batches in runs:
            for batch in batches:
                await visit.outbox.put(RunResponse(progress=batch))
    # Everything that was shown comes before the result.
    await build.over.wait()
    if build.result is None:
        raise NodeLostError("the node failed; its log says more")
    await visit.outbox.put(RunResponse(result=build.result))
    while not visit.over.is_set():
        before = (visit.outbox.taken, build.stats.returned_bytes)
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await visit.over.wait()
        except TimeoutError:
            if before == (visit.outbox.taken, build.stats.returned_bytes):
                raise NodeLostError(
                    f"the client fetched nothing for {IDLE_SECONDS:.0f} seconds; "
                    "the results of its build are given up"
                ) from None


async def _listen(
    host: Host, build: BuildJob | EndedBuild, visit: Visit, requests: AsyncIterator[RunRequest]
) -> None:
    try:
        async for request in requests:
            _take(host, build, visit, request)
    except OffloadError as error:
        log.warning("client.refused", build_id=build.build_id, reason=error.message)
        if not isinstance(build, EndedBuild) and not visit.view_only:
            # The result of the build says why.
            build.lose(error)
        else:
            visit.end(error)
    except (grpc.RpcError, asyncio.InvalidStateError) as error:
        log.debug("client.stream.broken", build_id=build.build_id, error=str(error))
    finally:
        # Half-closed or broken: nothing will be answered or fetched any more.
        if not isinstance(build, EndedBuild):
            build.seat.lost(visit)
        visit.over.set()


def _take(host: Host, build: BuildJob | EndedBuild, visit: Visit, request: RunRequest) -> None:
    kind = request.WhichOneof("message")
    if kind == "done":
        visit.over.set()
    elif kind == "leave":
        if isinstance(build, EndedBuild):
            visit.left = True
            visit.end()
        else:
            build.seat.leave(visit)
    elif kind in ("start", "rejoin", None):
        raise UsageError("a build is started once per call")
    elif visit.view_only:
        raise UsageError("a client that only looks on has nothing to say")
    elif kind == "cancel":
        host.cancel(build.build_id, request.cancel.reason[:200] or "canceled")
    elif not isinstance(build, EndedBuild):
        _hear(build, request)


def _hear(job: BuildJob, request: RunRequest) -> None:
    """Pass an answer of the client on to those who wait for it."""
    link = job.link
    link.heard()
    kind = request.WhichOneof("message")
    if kind in ANSWERS:
        getattr(link, kind)(getattr(request, kind))
    elif kind == "blob_failure":
        job.content.blob_failure(request.blob_failure)
    else:
        raise UsageError("the client sent an answer that this node did not ask for")

"""The gRPC services of a node: thin, the work is in `agent`, `job` and `uploads`."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from offload_builder.node.uploads import Upload
from offload_core.aio import finish
from offload_core.errors import (
    AccessDeniedError,
    NodeLostError,
    NotFoundError,
    OffloadError,
    QuotaExceededError,
    UsageError,
)
from offload_core.tls import peer_identity
from offload_proto.v1.node_service_pb2 import (
    DownloadResponse,
    Failure,
    ReadOutputResponse,
    Result,
    RunResponse,
)
from offload_proto.v1.node_service_pb2_grpc import (
    BlobsServiceServicer,
    NodeBuildsServiceServicer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_builder.node.agent import NodeAgent
    from offload_builder.node.job import BuildJob
    from offload_proto.v1.node_service_pb2 import (
        DownloadRequest,
        ReadOutputRequest,
        RunRequest,
        Start,
        UploadRequest,
        UploadResponse,
    )

log = structlog.get_logger(__name__)

START_SECONDS = 30.0
STOP_SECONDS = 15.0
IDLE_SECONDS = 600.0
"""A client that fetches nothing of a finished build for so long, and does not leave, is sent away.
Docker may unpack a large layer for minutes without reading the next one."""
MAX_UPLOADS = 8
"""Upload streams of one build at a time."""
CHUNK_BYTES = 1 << 20
BUILD_ID_KEY = "offload-build-id"

Context = Any  # grpc.aio.ServicerContext with its two type parameters


def member_name(context: Context) -> str:
    """Return the name of the member who calls.

    Raises:
        AuthenticationError: there is no certificate of ours.
        AccessDeniedError: the certificate is that of a node, whose names say nothing of members.
    """
    identity = peer_identity(context)
    if identity.kind != "member":
        raise AccessDeniedError("only members of the pool build; this is the certificate of a node")
    return identity.name


class NodeBuilds(NodeBuildsServiceServicer):
    """`offload.v1.NodeBuildsService`."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    async def Run(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[RunRequest], context: Context
    ) -> AsyncIterator[RunResponse]:
        """Run one build; see the .proto file."""
        member = member_name(context)
        job = await self._agent.admit(await _start(request_iterator), member=member)
        outbox = job.link.outbox
        work = asyncio.ensure_future(self._work(job, request_iterator))
        work.add_done_callback(lambda _: outbox.finish())
        try:
            while (message := await outbox.get()) is not None:
                yield message
            await work
        finally:
            job.lose(NodeLostError("the client went away"))
            outbox.drop()
            work.cancel()
            try:
                await finish(asyncio.wait((work,)), STOP_SECONDS)
            finally:
                if work.done() and not work.cancelled():
                    work.exception()
                self._agent.release(job)

    async def _work(self, job: BuildJob, requests: AsyncIterator[RunRequest]) -> None:
        over = asyncio.Event()
        listening = asyncio.ensure_future(self._listen(job, requests, over))
        showing = asyncio.ensure_future(self._show(job))
        try:
            result, reason = await self._agent.execute(job)
            self._agent.finished(job, result, reason)
            if result is None:
                failure = Failure(kind=Failure.KIND_CANCELED, message=reason)
                result = Result(failure=failure, stats=job.stats)
            await self._deliver(job, asyncio.ensure_future(self._tell(job, result, showing, over)))
        except asyncio.CancelledError:
            self._agent.finished(job, None, "the client went away")
            raise
        except BaseException:
            failure = Failure(kind=Failure.KIND_NODE, message="the node failed; its log says more")
            self._agent.finished(job, Result(failure=failure), "")
            raise
        finally:
            listening.cancel()
            showing.cancel()
            await finish(asyncio.wait((listening, showing)), STOP_SECONDS)

    @staticmethod
    async def _tell(
        job: BuildJob, result: Result, showing: asyncio.Task[None], over: asyncio.Event
    ) -> None:
        # Everything that was shown comes before the result.
        await showing
        await job.link.outbox.put(RunResponse(result=result))
        await over.wait()

    @staticmethod
    async def _deliver(job: BuildJob, telling: asyncio.Task[None]) -> None:
        """Wait until the client has what it wants, for as long as it fetches something."""
        try:
            while not telling.done():
                before = (job.link.outbox.taken, job.stats.returned_bytes)
                await asyncio.wait((telling,), timeout=IDLE_SECONDS)
                after = (job.link.outbox.taken, job.stats.returned_bytes)
                if before == after and not telling.done():
                    raise NodeLostError(
                        f"the client fetched nothing for {IDLE_SECONDS:.0f} seconds; "
                        "the results of its build are given up"
                    )
            telling.result()
        finally:
            telling.cancel()

    @staticmethod
    async def _show(job: BuildJob) -> None:
        async with aclosing(job.journal.read()) as runs:
            async for batches in runs:
                for batch in batches:
                    await job.link.outbox.put(RunResponse(progress=batch))

    async def _listen(
        self, job: BuildJob, requests: AsyncIterator[RunRequest], over: asyncio.Event
    ) -> None:
        link = job.link
        try:
            async for request in requests:
                link.heard()
                kind = request.WhichOneof("message")
                if kind == "context_listing":
                    link.context_listing(request.context_listing)
                elif kind == "context_page":
                    link.context_page(request.context_page)
                elif kind == "context_failure":
                    link.context_failure(request.context_failure)
                elif kind == "credentials_reply":
                    link.credentials_reply(request.credentials_reply)
                elif kind == "blob_failure":
                    job.content.blob_failure(request.blob_failure)
                elif kind == "cancel":
                    self._agent.cancel(job.build_id, request.cancel.reason[:200] or "canceled")
                elif kind == "done":
                    over.set()
                else:
                    raise UsageError("a build is started once per call")
        except OffloadError as error:
            log.warning("client.refused", build_id=job.build_id, reason=error.message)
            job.lose(error)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            log.debug("client.stream.broken", build_id=job.build_id, error=str(error))
        finally:
            # Half-closed or broken: nothing will be answered or fetched any more.
            job.lose(NodeLostError("the client went away"))
            over.set()


async def _start(requests: AsyncIterator[RunRequest]) -> Start:
    try:
        async with asyncio.timeout(START_SECONDS):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        raise UsageError(
            f"the client sent nothing within {START_SECONDS:.0f} seconds of its call"
        ) from None
    if first is None or first.WhichOneof("message") != "start":
        raise UsageError("the first message of a build must be Start")
    return first.start


class Blobs(BlobsServiceServicer):
    """`offload.v1.BlobsService`."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    def _job(self, context: Context) -> BuildJob:
        build_id = dict(context.invocation_metadata() or ()).get(BUILD_ID_KEY, "")
        return self._agent.job(str(build_id), member=member_name(context))

    async def Upload(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[UploadRequest], context: Context
    ) -> AsyncIterator[UploadResponse]:
        """Take context files; see the .proto file."""
        job = self._job(context)
        if job.open_uploads >= MAX_UPLOADS:
            raise QuotaExceededError(f"more than {MAX_UPLOADS} uploads of one build are open")
        job.open_uploads += 1
        try:
            upload = Upload(job.content)
            async with aclosing(upload.run(request_iterator)) as responses:
                async for response in responses:
                    yield response
        finally:
            job.open_uploads -= 1

    async def Download(  # noqa: N802 - name of the RPC
        self, request: DownloadRequest, context: Context
    ) -> AsyncIterator[DownloadResponse]:
        """Give a blob of the build's image; see the .proto file."""
        job = self._job(context)
        total = job.image.size(request.digest)
        offset = request.offset_bytes
        if not 0 <= offset <= total:
            raise UsageError(f"{request.digest} has {total} bytes, none from {offset} on")
        path = await job.image.path(request.digest)
        try:
            # Not in a thread: if this call ended meanwhile, nobody would close the file.
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"{request.digest} is no longer on this node") from error
        try:
            head = DownloadResponse(
                total_bytes=total, media_type=job.image.media_type(request.digest)
            )
            while data := await asyncio.to_thread(os.pread, file, CHUNK_BYTES, offset):
                head.data = data
                yield head
                job.stats.returned_bytes += len(data)
                offset += len(data)
                head = DownloadResponse()
            if head.total_bytes:
                yield head
        finally:
            os.close(file)

    async def ReadOutput(  # noqa: N802 - name of the RPC
        self, request: ReadOutputRequest, context: Context
    ) -> AsyncIterator[ReadOutputResponse]:
        """Give the stream of an exporter; see the .proto file."""
        job = self._job(context)
        async with aclosing(job.read_output(request.output_index)) as pieces:
            async for data in pieces:
                job.stats.returned_bytes += len(data)
                yield ReadOutputResponse(data=data)

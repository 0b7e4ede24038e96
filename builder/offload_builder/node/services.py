"""The gRPC services of a node: thin, the work is in `agent`, `job` and `uploads`."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from offload_builder.node.uploads import Upload
from offload_core.errors import NodeLostError, OffloadError, UsageError
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
        UploadRequest,
        UploadResponse,
    )

START_SECONDS = 30.0
CHUNK_BYTES = 1 << 20
BUILD_ID_KEY = "offload-build-id"

Context = Any  # grpc.aio.ServicerContext with its two type parameters


class NodeBuilds(NodeBuildsServiceServicer):
    """`offload.v1.NodeBuildsService`."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    async def Run(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[RunRequest], context: Context
    ) -> AsyncIterator[RunResponse]:
        """Run one build; see the .proto file."""
        async with asyncio.timeout(START_SECONDS):
            first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "start":
            raise UsageError("the first message of a build must be Start")
        job = await self._agent.admit(first.start, member=peer_identity(context).name)
        over = asyncio.Event()
        work = asyncio.ensure_future(self._work(job, request_iterator, over))
        try:
            while (message := await job.link.outbox.get()) is not None:
                yield message
            await work
        finally:
            if not work.done():
                job.link.lose(NodeLostError("the client went away"))
                work.cancel()
                await asyncio.wait((work,))
            self._agent.release(job)

    async def _work(
        self, job: BuildJob, requests: AsyncIterator[RunRequest], over: asyncio.Event
    ) -> None:
        outbox = job.link.outbox
        listening = asyncio.ensure_future(self._listen(job, requests, over))
        showing = asyncio.ensure_future(self._show(job))
        result: Result | None = None
        reason = "the client went away"
        try:
            result, reason = await self._agent.execute(job)
            self._agent.finished(job, result, reason)
            if result is None:
                failure = Failure(kind=Failure.KIND_CANCELED, message=reason)
                result = Result(failure=failure, stats=job.stats)
            # Everything that was shown comes before the result.
            await showing
            await outbox.put(RunResponse(result=result))
            await over.wait()
            await outbox.put(None)
        except asyncio.CancelledError:
            if result is None:
                self._agent.finished(job, None, "the client went away")
            raise
        except BaseException:
            if result is None:
                self._agent.finished(job, Result(failure=Failure(message="the node failed")), "")
            outbox.put_nowait(None) if not outbox.full() else None
            raise
        finally:
            listening.cancel()
            showing.cancel()

    @staticmethod
    async def _show(job: BuildJob) -> None:
        async for batches in job.journal.read():
            for batch in batches:
                await job.link.outbox.put(RunResponse(progress=batch))

    async def _listen(
        self, job: BuildJob, requests: AsyncIterator[RunRequest], over: asyncio.Event
    ) -> None:
        link = job.link
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind == "context_entries":
                    link.context_entries(request.context_entries)
                elif kind == "context_failure":
                    link.context_failure(request.context_failure)
                elif kind == "credentials_reply":
                    link.credentials_reply(request.credentials_reply)
                elif kind == "blob_failure":
                    link.blob_failure(request.blob_failure)
                elif kind == "cancel":
                    self._agent.cancel(job.build_id, request.cancel.reason or "canceled")
                elif kind == "done":
                    over.set()
        except OffloadError as error:
            link.lose(error)
        finally:
            # Half-closed or broken: nothing will be answered or fetched any more.
            link.lose(NodeLostError("the client went away"))
            over.set()


class Blobs(BlobsServiceServicer):
    """`offload.v1.BlobsService`."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    def _job(self, context: Context) -> BuildJob:
        build_id = dict(context.invocation_metadata() or ()).get(BUILD_ID_KEY, "")
        return self._agent.job(str(build_id), member=peer_identity(context).name)

    async def Upload(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[UploadRequest], context: Context
    ) -> AsyncIterator[UploadResponse]:
        """Take context files; see the .proto file."""
        job = self._job(context)
        async for response in Upload(job.context_store, job.link, job.stats).run(request_iterator):
            yield response

    async def Download(  # noqa: N802 - name of the RPC
        self, request: DownloadRequest, context: Context
    ) -> AsyncIterator[DownloadResponse]:
        """Give a blob of the build's image; see the .proto file."""
        job = self._job(context)
        total = job.image.size(request.digest)
        path = await job.image.path(request.digest)
        offset = request.offset_bytes
        file = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
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
        finally:
            os.close(file)

    async def ReadOutput(  # noqa: N802 - name of the RPC
        self, request: ReadOutputRequest, context: Context
    ) -> AsyncIterator[ReadOutputResponse]:
        """Give the stream of an exporter; see the .proto file."""
        job = self._job(context)
        async for data in job.read_output(request.output_index):
            job.stats.returned_bytes += len(data)
            yield ReadOutputResponse(data=data)

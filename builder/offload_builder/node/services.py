"""The gRPC services of a node: thin, the work is in `agent`, `attending`, `job` and `uploads`."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from offload_builder.egress.policy.ofbuild import read_build_policy
from offload_builder.node.attending import attend
from offload_builder.node.departure import Visit
from offload_builder.node.endedbuilds import EndedBuild
from offload_builder.node.indexpush import push_index
from offload_builder.node.pushing import push_image
from offload_builder.node.registryaccess import RegistryAccess
from offload_builder.node.savedimages import TICKET_KEY
from offload_builder.node.solvejob import SolveJob
from offload_builder.node.uploads import Upload
from offload_core.errors import (
    AccessDeniedError,
    NotFoundError,
    QuotaExceededError,
    UsageError,
)
from offload_core.tls import peer_identity
from offload_proto.v1.builds_service_pb2 import NetworkPolicy
from offload_proto.v1.node_service_pb2 import (
    DownloadResponse,
    ReadOutputResponse,
)
from offload_proto.v1.node_service_pb2_grpc import (
    BlobsServiceServicer,
    NodeBuildsServiceServicer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_builder.egress.policy.ofbuild import BuildPolicy
    from offload_builder.node.agent import NodeAgent
    from offload_builder.node.job import BuildJob
    from offload_builder.node.savedimages import SavedImage
    from offload_core.tls import Identity
    from offload_proto.v1.node_service_pb2 import (
        DownloadRequest,
        PushImageRequest,
        PushImageResponse,
        PushIndexRequest,
        PushIndexResponse,
        ReadOutputRequest,
        RunRequest,
        RunResponse,
        UploadRequest,
        UploadResponse,
    )

START_SECONDS = 30.0
ADMIN = "admin"
MAX_UPLOADS = 8
"""Upload streams of one build at a time."""
MAX_VISITS = 32
"""Calls of clients to one build at a time; each may have some MB of output on its way."""
CHUNK_BYTES = 1 << 20
BUILD_ID_KEY = "offload-build-id"

Context = Any  # grpc.aio.ServicerContext with its two type parameters


def member_name(context: Context) -> str:
    """Return the name of the member who calls; raises as `member_identity`."""
    return member_identity(context).name


def _build_id(context: Context) -> str:
    return str(dict(context.invocation_metadata() or ()).get(BUILD_ID_KEY, ""))


def member_identity(context: Context) -> Identity:
    """Return who calls.

    Raises:
        AuthenticationError: there is no certificate of ours.
        AccessDeniedError: the certificate is that of a node, whose names say nothing of members.
    """
    identity = peer_identity(context)
    if identity.kind != "member":
        raise AccessDeniedError("only members of the pool build; this is the certificate of a node")
    return identity


class NodeBuilds(NodeBuildsServiceServicer):
    """`offload.v1.NodeBuildsService`."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    async def Run(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[RunRequest], context: Context
    ) -> AsyncIterator[RunResponse]:
        """Start one build and be its client; see the .proto file."""
        member = member_name(context)
        first = await _first(request_iterator, "start")
        job = await self._agent.admit(first.start, member=member, make=SolveJob)
        visit = job.seat.first()
        async with aclosing(attend(self._agent, job, visit, request_iterator)) as messages:
            async for message in messages:
                yield message

    async def Rejoin(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[RunRequest], context: Context
    ) -> AsyncIterator[RunResponse]:
        """Take up a build that runs here or has ended; see the .proto file."""
        identity = member_identity(context)
        wish = (await _first(request_iterator, "rejoin")).rejoin
        looks_on = wish.view_only and identity.role == ADMIN
        build = self._agent.find(wish.build_id, member=None if looks_on else identity.name)
        visit = Visit(view_only=wish.view_only)
        calls = build.visits if isinstance(build, EndedBuild) else build.seat.visits
        # Who takes the place of another is one more for a moment only.
        if calls >= MAX_VISITS and (wish.view_only or build.over.is_set()):
            raise QuotaExceededError(f"more than {MAX_VISITS} clients look at this build; end some")
        if not isinstance(build, EndedBuild):
            build.seat.rejoin(visit)
        after = max(0, wish.resume_after)
        call = attend(self._agent, build, visit, request_iterator, after)
        async with aclosing(call) as messages:
            async for message in messages:
                yield message

    async def PushImage(  # noqa: N802 - name of the RPC
        self, request: PushImageRequest, context: Context
    ) -> PushImageResponse:
        """Push the image of a build that has ended well; see the .proto file."""
        build = await _with_image(self._agent, request.build_id, context)
        # A command of its own: what the build has brought to narrow its steps is not asked.
        return await push_image(build, request, self._access(build.project_id))

    async def PushIndex(  # noqa: N802 - name of the RPC
        self, request: PushIndexRequest, context: Context
    ) -> PushIndexResponse:
        """Push one index over what several nodes have pushed; see the .proto file."""
        build = self._agent.find(request.build_id, member=member_name(context))
        narrowed = None
        if build.network_policy:
            policy = NetworkPolicy.FromString(build.network_policy)
            narrowed = await asyncio.to_thread(read_build_policy, policy, admitted=True)
        return await push_index(build, request, self._access(build.project_id, narrowed))

    def _access(self, project_id: str, narrowed: BuildPolicy | None = None) -> RegistryAccess:
        judge = self._agent.isolation.judge(project_id, narrowed)
        return RegistryAccess(self._agent.registry_endpoint, judge)


async def _with_image(
    agent: NodeAgent, build_id: str, context: Context
) -> BuildJob | EndedBuild | SavedImage:
    """Return the build whose image a client wants, or the image that it has a ticket for."""
    member = member_name(context)
    ticket = dict(context.invocation_metadata() or ()).get(TICKET_KEY, "")
    if ticket:
        return await agent.saved.open(str(ticket), build_id, member=member)
    return agent.find(build_id, member=member)


async def _first(requests: AsyncIterator[RunRequest], kind: str) -> RunRequest:
    try:
        async with asyncio.timeout(START_SECONDS):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        raise UsageError(
            f"the client sent nothing within {START_SECONDS:.0f} seconds of its call"
        ) from None
    if first is None or first.WhichOneof("message") != kind:
        raise UsageError(f"the first message of this call must be {kind.capitalize()}")
    return first


class Blobs(BlobsServiceServicer):
    """`offload.v1.BlobsService`."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    def _job(self, context: Context) -> BuildJob:
        return self._agent.job(_build_id(context), member=member_name(context))

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
        job = await _with_image(self._agent, _build_id(context), context)
        if isinstance(job, EndedBuild):
            await job.know_image()
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

"""The control API of one BuildKit daemon."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from offload_builder.buildkit.buildrecord import forget_record, read_provenance
from offload_builder.buildkit.failure import SolveFailure, failure_from_status
from offload_builder.buildkit.frontendcall import ask_frontend
from offload_builder.buildkit.h2.client import GrpcClient
from offload_builder.buildkit.h2.messages import CANCELLED, UNAVAILABLE, GrpcError
from offload_builder.buildkit.heldsolve import HeldSolve
from offload_builder.buildkit.solve import SolveResult, solve_request
from offload_builder.buildkit.status import progress_batch
from offload_builder.buildkit.stepgroups import trace_headers
from offload_core.errors import InternalError, NodeLostError, OffloadError
from offload_proto.buildkit import control_pb2 as control

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

    from offload_builder.buildkit.heldsolve import HeldRequests
    from offload_builder.buildkit.session import BkSession
    from offload_builder.buildkit.solve import SolveSpec
    from offload_proto.v1.events_pb2 import ProgressBatch

_SERVICE = "/moby.buildkit.v1.Control/"


ALIAS_ANNOTATION = "org.mobyproject.buildkit.device.class"
"""A further name of a device (BuildKit's solver/llbsolver/cdidevices)."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that steps can have.

    Attributes:
        name: fully qualified, VENDOR/CLASS=NAME.
        alias: further name; empty for none.
        auto_allowed: steps get it without an entitlement.
    """

    name: str
    alias: str = ""
    auto_allowed: bool = False


@dataclass(frozen=True, slots=True)
class DaemonInfo:
    """What a daemon says of itself.

    Attributes:
        version: release, for example "v0.33.1".
        revision: source revision.
        worker_id: identifier of its worker, kept in its root directory.
        platforms: "linux/amd64", ..., the native one first.
        labels: facts about the worker, such as its snapshotter.
        devices: of its worker.
    """

    version: str
    revision: str
    worker_id: str
    platforms: tuple[str, ...]
    labels: dict[str, str]
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One thing that a daemon keeps.

    Attributes:
        size_bytes: bytes of its own.
        kind: BuildKit's name, for example "regular" or "exec.cachemount".
        created_at: seconds since 1970.
        last_used_at: seconds since 1970; 0 for never.
    """

    id: str
    size_bytes: int
    kind: str
    description: str
    in_use: bool
    mutable: bool
    shared: bool
    usage_count: int
    created_at: float
    last_used_at: float
    parents: tuple[str, ...]


class BuildkitClient:
    """Calls to the daemon at a unix socket; `async with`, or `close` at the end.

    Args:
        socket_path: the daemon's socket.
        explain_loss: tells why the daemon went away, in one clause; asked after a connection was
            lost.
    """

    def __init__(
        self, socket_path: Path, *, explain_loss: Callable[[], Awaitable[str]] | None = None
    ) -> None:
        self.socket_path = socket_path
        self._explain_loss = explain_loss
        self._grpc = GrpcClient(socket_path)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._grpc.close()

    async def info(self, timeout: float = 10.0) -> DaemonInfo:
        """Ask the daemon what it is; it answers only when it is ready.

        Raises:
            NodeLostError: no answer within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                answer = await self._unary("Info", control.InfoRequest())
                listed = await self._unary("ListWorkers", control.ListWorkersRequest())
        except GrpcError as error:
            raise await self._translated("answer", error) from error
        except TimeoutError as error:
            raise NodeLostError(f"BuildKit did not answer within {timeout:g} seconds") from error
        version = control.InfoResponse.FromString(answer).buildkitVersion
        workers = control.ListWorkersResponse.FromString(listed).record
        if not workers:
            raise NodeLostError("BuildKit has no worker that can build")
        worker = workers[0]
        platforms = (
            "/".join(filter(None, (item.OS, item.Architecture, item.Variant)))
            for item in worker.platforms
        )
        return DaemonInfo(
            version=version.version,
            revision=version.revision,
            worker_id=worker.ID,
            platforms=tuple(platforms),
            labels=dict(worker.Labels),
            devices=tuple(
                Device(item.Name, item.Annotations.get(ALIAS_ANNOTATION, ""), item.AutoAllow)
                for item in worker.CDIDevices
                # The others have to be set up first, which reaches for the network.
                if not item.OnDemand
            ),
        )

    async def solve(
        self, spec: SolveSpec, session: BkSession | None = None
    ) -> SolveResult | SolveFailure:
        """Run a build and wait for its end; cancelling this kills its running steps.

        A build has no time limit here.

        Returns:
            The result, or why the build failed.

        Raises:
            OffloadError: what a provider of the session raised, if that made the build fail.
            NodeLostError: the daemon or the session went away.
        """
        asked = session.id if session is not None and session.has_rules else ""
        request = solve_request(spec, session.id if session else "", asked)
        try:
            answer = await self._solve_with(request, session, trace_headers(spec.trace))
        except GrpcError as error:
            if session is not None and session.failure is not None:
                raise session.failure from error
            if _means_loss(error):
                raise await self._translated("run the build", error) from error
            return failure_from_status(error)
        response = control.SolveResponse.FromString(answer)
        return SolveResult(exporter_response=dict(response.ExporterResponse))

    async def _solve_with(
        self, request: bytes, session: BkSession | None, metadata: Sequence[tuple[str, str]]
    ) -> bytes:
        """Run the call; BuildKit would wait for a lost session in vain, so it ends the call."""
        if session is None:
            return await self._grpc.unary(f"{_SERVICE}Solve", request, metadata)
        call = asyncio.ensure_future(self._grpc.unary(f"{_SERVICE}Solve", request, metadata))
        lost = asyncio.ensure_future(session.lost.wait())
        try:
            await asyncio.wait((call, lost), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                # Both end together when the daemon dies; the call may know more.
                await asyncio.wait((call,), timeout=1.0)
            if not call.done():
                raise GrpcError(UNAVAILABLE, f"the session was lost: {session.lost_reason}")
            return call.result()
        finally:
            for task in (call, lost):
                task.cancel()
            await asyncio.gather(call, lost, return_exceptions=True)

    async def ask(
        self, spec: SolveSpec, session: BkSession | None = None
    ) -> dict[str, bytes] | SolveFailure:
        """Ask the frontend of `spec` what its "requestid" says; nothing is built.

        Returns:
            The notes of the answer by name, such as "result.json", or why there is none.

        Raises:
            OffloadError: as `solve`.
        """
        waiting = replace(spec, frontend="", frontend_attributes={}, exporters=())
        solving = asyncio.ensure_future(self.solve(waiting, session))
        asking = asyncio.ensure_future(
            ask_frontend(self._grpc, spec.ref, spec.frontend, spec.frontend_attributes, spec.trace)
        )
        try:
            await asyncio.wait((solving, asking), return_when=asyncio.FIRST_COMPLETED)
            if asking.done() and (error := asking.exception()) and not isinstance(error, GrpcError):
                raise error
            # It has the better words for what went wrong.
            outcome = await solving
            return outcome if isinstance(outcome, SolveFailure) else await asking
        except (GrpcError, TimeoutError) as error:
            raise await self.lost_error("answer a call", str(error)) from error
        finally:
            for task in (solving, asking):
                task.cancel()
            await asyncio.gather(solving, asking, return_exceptions=True)

    def hold(self, requests: HeldRequests, show: Callable[[bytes], None]) -> HeldSolve:
        """Begin a solve that ends with nothing done unless it is released; see `HeldSolve`."""
        return HeldSolve(self._grpc, requests, show)

    async def take_provenance(self, ref: str) -> dict[str, bytes]:
        """Return the provenance that was recorded of a build, and forget the record.

        Returns:
            JSON by platform; "" for a build for one.

        Raises:
            NodeLostError: the daemon went away.
            InternalError: it refuses.
        """
        try:
            found = await read_provenance(self._grpc, ref)
            await forget_record(self._grpc, ref)
        except GrpcError as error:
            raise await self._translated("tell the provenance of a build", error) from error
        return found

    async def forget(self, ref: str) -> None:
        """Forget the record of a build that has ended, if there is one.

        Raises:
            NodeLostError: the daemon went away.
        """
        try:
            await forget_record(self._grpc, ref)
        except GrpcError as error:
            if _means_loss(error):
                raise await self._translated("forget a build", error) from error

    async def status(self, ref: str) -> AsyncGenerator[ProgressBatch]:
        """Follow a build until it is over; the batches carry no sequence numbers.

        May be called before `solve`: the daemon waits some seconds for the build to begin. What
        it told while nobody looked is one batch.

        Raises:
            NodeLostError: the daemon went away.
            InternalError: there is no such build.
        """
        async with aclosing(self.status_messages(ref)) as runs:
            async for _, batch in runs:
                yield batch

    async def status_messages(self, ref: str) -> AsyncGenerator[tuple[bytes, ProgressBatch]]:
        """Do as `status`, with each batch as the daemon has sent it: a serialised StatusResponse.

        Raises:
            OffloadError: see `status`.
        """
        request = control.StatusRequest(Ref=ref).SerializeToString()
        try:
            async with aclosing(self._grpc.stream_runs(f"{_SERVICE}Status", request)) as runs:
                async for messages in runs:
                    # Messages in a row read as one message with the items of all of them
                    # (protobuf.dev, encoding, last one wins).
                    raw = b"".join(messages)
                    yield raw, progress_batch(raw)
        except GrpcError as error:
            raise await self._translated("report progress", error) from error

    async def disk_usage(
        self, filters: Sequence[str] = (), timeout: float = 60.0
    ) -> list[DiskRecord]:
        """List what the daemon keeps, limited by containerd's filter syntax.

        Raises:
            NodeLostError: no answer within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                answer = await self._unary("DiskUsage", control.DiskUsageRequest(filter=filters))
        except GrpcError as error:
            raise await self._translated("list its disk usage", error) from error
        except TimeoutError as error:
            raise NodeLostError(f"BuildKit did not answer within {timeout:g} seconds") from error
        return [_disk_record(r) for r in control.DiskUsageResponse.FromString(answer).record]

    async def prune(
        self,
        *,
        filters: Sequence[str] = (),
        everything: bool = False,
        keep_seconds: float = 0,
        reserved_bytes: int = 0,
        max_used_bytes: int = 0,
        min_free_bytes: int = 0,
    ) -> list[DiskRecord]:
        """Delete what no build uses, within the limits, and return what was deleted.

        Args:
            filters: conditions in containerd's filter syntax, any of which must hold.
            everything: also what is shared with images, and internal records.
            keep_seconds: keep what was used in so many seconds.
            reserved_bytes: keep so many bytes in any case.
            max_used_bytes: stop when no more than so many bytes are used; 0 for no limit.
            min_free_bytes: stop when so many bytes of the disk are free; 0 for no limit.

        Raises:
            NodeLostError: the daemon does not answer.
        """
        request = control.PruneRequest(
            filter=filters,
            all=everything,
            keepDuration=int(keep_seconds * 1e9),
            reservedSpace=reserved_bytes,
            maxUsedSpace=max_used_bytes,
            minFreeSpace=min_free_bytes,
        )
        deleted: list[DiskRecord] = []
        try:
            data = request.SerializeToString()
            async with aclosing(self._grpc.stream(f"{_SERVICE}Prune", data)) as messages:
                deleted.extend(
                    [
                        _disk_record(control.UsageRecord.FromString(message))
                        async for message in messages
                    ]
                )
        except GrpcError as error:
            raise await self._translated("prune", error) from error
        return deleted

    async def passed_on(self, method: str, request: bytes) -> AsyncGenerator[bytes]:
        """Call "/package.Service/Method" for somebody else: yield the answers as they come.

        Raises:
            GrpcError: as the daemon says it.
        """
        async with aclosing(self._grpc.stream(method, request)) as messages:
            async for message in messages:
                yield message

    async def has_record(self, ref: str) -> bool:
        """Return whether a build of this name runs or is in the daemon's history.

        Raises:
            NodeLostError: the daemon went away.
        """
        request = control.BuildHistoryRequest(Ref=ref, EarlyExit=True).SerializeToString()
        try:
            async with aclosing(
                self._grpc.stream(f"{_SERVICE}ListenBuildHistory", request)
            ) as events:
                async for _ in events:
                    return True
        except GrpcError as error:
            raise await self._translated("look for a build", error) from error
        return False

    async def lost_error(self, action: str, reason: str) -> NodeLostError:
        """Return the error for a daemon that went away, with the cause if it is known."""
        cause = await self._explain_loss() if self._explain_loss is not None else ""
        return NodeLostError(f"BuildKit could not {action}: {cause or reason}")

    async def _unary(self, method: str, request: Message) -> bytes:
        return await self._grpc.unary(_SERVICE + method, request.SerializeToString())

    async def _translated(self, action: str, error: GrpcError) -> OffloadError:
        if _means_loss(error):
            return await self.lost_error(action, error.message)
        return InternalError(f"BuildKit could not {action}: {error.message}")


def _means_loss(error: GrpcError) -> bool:
    # A daemon that stops cancels its builds. UNAVAILABLE with details is an answer, for example
    # that of a registry.
    return error.code == CANCELLED or (error.code == UNAVAILABLE and not error.details)


def _disk_record(record: control.UsageRecord) -> DiskRecord:
    created, used = record.CreatedAt, record.LastUsedAt
    return DiskRecord(
        id=record.ID,
        size_bytes=record.Size,
        kind=record.RecordType,
        description=record.Description,
        in_use=record.InUse,
        mutable=record.Mutable,
        shared=record.Shared,
        usage_count=record.UsageCount,
        created_at=created.seconds + created.nanos / 1e9,
        last_used_at=used.seconds + used.nanos / 1e9,
        parents=tuple(record.Parents),
    )

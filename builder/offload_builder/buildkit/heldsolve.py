"""A solve of our own beside that of a client, held until it is known whether it is needed.

BuildKit runs steps that are in two solves at the same time once, for both. So a second solve that
has the definition of the first one gets all results, by the same keys, at next to no cost. It has
no record in the history, and ends with nothing done unless it is released.
Source: BuildKit solver/jobs.go (loadUnlocked), control/gateway/gateway.go.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from offload_builder.buildkit.frontendcall import BUILD_ID, LLB_SOLVE, return_result
from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.solve import new_ref
from offload_core.errors import InternalError
from offload_proto.buildkit import control_pb2 as control
from offload_proto.buildkit import gateway_pb2 as gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_builder.buildkit.h2.client import GrpcClient
    from offload_builder.buildkit.solve import Attributed

WATCH_SECONDS = 1.0
"""The daemon keeps the progress of a solve until somebody reads it; most are over before that."""
LAST_WORD_SECONDS = 1.0
EXPORT_NAME = "exporting cache"
"""How BuildKit begins the names of cache exports (cache/remotecache/export.go)."""
_CONTROL = "/moby.buildkit.v1.Control/"


class HeldRequests(NamedTuple):
    """What is sent to hold a solve.

    Attributes:
        ref: its name.
        solve: serialised control SolveRequest.
        call: serialised LLBBridge SolveRequest.
    """

    ref: str
    solve: bytes
    call: bytes


def held_requests(
    order: bytes, call: bytes, definition: bytes, exports: Sequence[Attributed]
) -> HeldRequests:
    """Return the requests for a solve that does what that of a client does, and exports the cache.

    Args:
        order: serialised control SolveRequest of the client, as BuildKit has got it.
        call: serialised LLBBridge SolveRequest of the client.
        definition: serialised definition that BuildKit has made of that.
        exports: caches to write.
    """
    ref = new_ref()
    request = control.SolveRequest.FromString(order)
    # What remains, such as policies for sources, makes the steps the same.
    for name in ("Exporters", "ExporterDeprecated", "ExporterAttrsDeprecated", "Cache"):
        request.ClearField(name)
    request.EnableSessionExporter = False
    request.Ref, request.Internal = ref, True
    entries = (control.CacheOptionsEntry(Type=kind, Attrs=dict(v)) for kind, v in exports)
    request.Cache.Exports.extend(entries)
    evaluation = gateway.SolveRequest.FromString(call)
    for name in ("Frontend", "FrontendOpt", "CacheImports"):
        evaluation.ClearField(name)  # type: ignore[arg-type]
    evaluation.Definition = definition
    evaluation.allowResultReturn = evaluation.allowResultArrayRef = evaluation.Evaluate = True
    return HeldRequests(ref, request.SerializeToString(), evaluation.SerializeToString())


def answered_definition(answer: bytes) -> tuple[str, bytes]:
    """Return name and definition of the result in a serialised LLBBridge SolveResponse.

    Both are empty when it has not just one.
    """
    try:
        ref = gateway.SolveResponse.FromString(answer).result.ref
    except DecodeError:
        return "", b""
    return ref.id, ref.definition


def returned_result(request: bytes) -> str:
    """Return the name of the result in a serialised ReturnRequest; empty if it has not just one."""
    try:
        return gateway.ReturnRequest.FromString(request).result.ref.id
    except DecodeError:
        return ""


class HeldSolve:
    """Begins at once; `release` or nothing, and `close` at the end.

    Args:
        grpc: to the daemon.
        requests: what is sent.
        show: takes serialised StatusResponses with the progress of the exports.
    """

    def __init__(
        self, grpc: GrpcClient, requests: HeldRequests, show: Callable[[bytes], None]
    ) -> None:
        self._grpc = grpc
        self._ref = requests.ref
        self._show = show
        self._exporting: set[str] = set()
        self._released = asyncio.Event()
        self._solving = asyncio.ensure_future(grpc.unary(f"{_CONTROL}Solve", requests.solve))
        self._evaluating = asyncio.ensure_future(self._evaluate(requests.call))
        self._watching = asyncio.ensure_future(self._watch())

    @property
    def has_results(self) -> bool:
        """Whether it has all results of the other solve."""
        done = self._evaluating.done() and not self._evaluating.cancelled()
        return done and self._evaluating.exception() is None

    async def release(self) -> None:
        """Have the results exported, and wait for that.

        Raises:
            GrpcError: BuildKit could not.
            InternalError: its answer cannot be used.
        """
        self._released.set()
        await asyncio.wait((self._solving, self._evaluating), return_when=asyncio.FIRST_COMPLETED)
        if self._solving.done():
            await self._solving
            raise InternalError("BuildKit ended a solve before it had a result")
        await return_result(self._grpc, self._ref, await self._evaluating)
        await self._solving
        await asyncio.wait((self._watching,), timeout=LAST_WORD_SECONDS)

    async def close(self) -> None:
        """End it; safe to call again."""
        tasks = (self._solving, self._evaluating, self._watching)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _evaluate(self, call: bytes) -> str:
        answer = await self._grpc.unary(LLB_SOLVE, call, ((BUILD_ID, self._ref),))
        return answered_definition(answer)[0]

    async def _watch(self) -> None:
        """Read the progress, and show that of the exports."""
        waiting = asyncio.ensure_future(self._released.wait())
        try:
            await asyncio.wait((waiting,), timeout=WATCH_SECONDS)
        finally:
            waiting.cancel()
        request = control.StatusRequest(Ref=self._ref).SerializeToString()
        try:
            async with aclosing(self._grpc.stream(f"{_CONTROL}Status", request)) as messages:
                async for message in messages:
                    if self._released.is_set() and (news := self._of_exports(message)):
                        self._show(news)
        except GrpcError:
            # What goes wrong is told by the solve.
            return

    def _of_exports(self, message: bytes) -> bytes:
        status = control.StatusResponse.FromString(message)
        vertexes = [item for item in status.vertexes if item.name.startswith(EXPORT_NAME)]
        self._exporting.update(item.digest for item in vertexes)
        statuses = [item for item in status.statuses if item.vertex in self._exporting]
        return control.StatusResponse(vertexes=vertexes, statuses=statuses).SerializeToString()

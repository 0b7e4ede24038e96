"""What a daemon says of itself to every client, asked once and answered from memory afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.buildkit.frontendcall import BUILD_ID
from offload_builder.buildkit.h2.client import GrpcClient
from offload_builder.buildkit.h2.messages import NOT_FOUND, UNKNOWN, GrpcError
from offload_builder.buildkit.solve import new_ref
from offload_core.aio import stop
from offload_core.errors import NodeLostError
from offload_proto.buildkit import control_pb2 as control
from offload_proto.buildkit import gateway_pb2 as gateway

if TYPE_CHECKING:
    from pathlib import Path

CONTROL = "/moby.buildkit.v1.Control/"
LLB_BRIDGE = "/moby.buildkit.v1.frontend.LLBBridge/"
ASK_SECONDS = 15.0
_RETRY_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Introduction:
    """Serialised answers of one daemon.

    Attributes:
        info: InfoResponse.
        workers: ListWorkersResponse.
        pong: PongResponse of LLBBridge, with the capabilities of frontends and builds.
    """

    info: bytes
    workers: bytes
    pong: bytes


async def introduce(socket: Path) -> Introduction:
    """Ask the daemon at a socket.

    The capabilities are told within a build only, so an empty one is begun and ended.

    Raises:
        NodeLostError: it does not answer.
    """
    try:
        async with asyncio.timeout(ASK_SECONDS), GrpcClient(socket) as grpc:
            info = await grpc.unary(f"{CONTROL}Info", control.InfoRequest().SerializeToString())
            request = control.ListWorkersRequest().SerializeToString()
            workers = await grpc.unary(f"{CONTROL}ListWorkers", request)
            return Introduction(info, workers, await _pong(grpc))
    except GrpcError as error:
        raise NodeLostError(f"BuildKit does not answer: {error.message}") from error
    except TimeoutError:
        raise NodeLostError(f"BuildKit did not answer within {ASK_SECONDS:g} seconds") from None


async def _pong(grpc: GrpcClient) -> bytes:
    ref = new_ref()
    request = control.SolveRequest(Ref=ref, Internal=True).SerializeToString()
    solving = asyncio.ensure_future(grpc.unary(f"{CONTROL}Solve", request))
    metadata = ((BUILD_ID, ref),)
    try:
        while True:
            try:
                pong = await grpc.unary(f"{LLB_BRIDGE}Ping", b"", metadata)
                break
            except GrpcError as error:
                # The build may not have begun yet.
                if solving.done() or error.code not in (NOT_FOUND, UNKNOWN):
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
        ending = gateway.ReturnRequest(result=gateway.Result()).SerializeToString()
        await grpc.unary(f"{LLB_BRIDGE}Return", ending, metadata)
        await solving
    finally:
        await stop(solving, expected=(GrpcError,))
    return pong

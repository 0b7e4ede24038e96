"""Asking a frontend something instead of building.

BuildKit gives the notes of a frontend's result to other frontends only, so the client of a solve
takes the place of the frontend: the solve waits until it says what the result is.
Source: BuildKit client/build.go, control/gateway/gateway.go.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from offload_builder.buildkit.h2.messages import GrpcError
from offload_builder.buildkit.stepgroups import trace_headers
from offload_core.errors import InternalError
from offload_proto.buildkit import gateway_pb2 as gateway

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_builder.buildkit.h2.client import GrpcClient

BUILD_ID = "buildkit-controlapi-buildid"
RETURN_SECONDS = 10.0
_SERVICE = "/moby.buildkit.v1.frontend.LLBBridge/"
LLB_SOLVE = f"{_SERVICE}Solve"


async def ask_frontend(
    grpc: GrpcClient, ref: str, frontend: str, attributes: Mapping[str, str], trace: str = ""
) -> dict[str, bytes]:
    """Run a frontend for the waiting solve `ref`, end that solve, and return the notes.

    Raises:
        GrpcError: the frontend failed.
        InternalError: the answer cannot be read.
        TimeoutError: BuildKit does not take the end of the solve.
    """
    metadata = ((BUILD_ID, ref),)
    request = gateway.SolveRequest(
        Frontend=frontend,
        FrontendOpt=attributes,
        allowResultReturn=True,
        allowResultArrayRef=True,
    )
    try:
        answer = await grpc.unary(
            LLB_SOLVE, request.SerializeToString(), (*metadata, *trace_headers(trace))
        )
    except GrpcError as error:
        await _return(grpc, metadata, gateway.ReturnRequest(error=_status(error)))
        raise
    await _return(grpc, metadata, gateway.ReturnRequest(result=gateway.Result()))
    try:
        return dict(gateway.SolveResponse.FromString(answer).result.metadata)
    except DecodeError as error:
        raise InternalError("BuildKit's answer to a call cannot be read") from error


async def return_result(grpc: GrpcClient, ref: str, result: str) -> None:
    """End the waiting solve `ref` with the result that BuildKit calls `result`.

    Raises:
        GrpcError: BuildKit does not take it.
        TimeoutError: it does not answer.
    """
    returned = gateway.Result(ref=gateway.Ref(id=result))
    await _return(grpc, ((BUILD_ID, ref),), gateway.ReturnRequest(result=returned))


async def _return(
    grpc: GrpcClient, metadata: Sequence[tuple[str, str]], request: gateway.ReturnRequest
) -> None:
    async with asyncio.timeout(RETURN_SECONDS):
        await grpc.unary(f"{_SERVICE}Return", request.SerializeToString(), metadata)


def _status(error: GrpcError) -> bytes:
    return error.details or Status(code=error.code, message=error.message).SerializeToString()

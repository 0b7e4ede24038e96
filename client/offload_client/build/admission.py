"""Asking the gateway for a node, and showing what one waits for."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc

from offload_core.aio import finish
from offload_core.errors import GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1.builds_service_pb2 import CancelRequest
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpc import aio

    from offload_proto.v1.builds_service_pb2 import Assigned, CreateRequest, Queued

LEAVE_SECONDS = 1.0


async def leave(channel: aio.Channel, build_id: str) -> None:
    """Give back a place in the queue or at a node, as far as the gateway can be reached."""
    stub = BuildsServiceStub(channel)
    leaving = stub.Cancel(
        CancelRequest(build_id=build_id), timeout=LEAVE_SECONDS, metadata=call_metadata()
    )
    with contextlib.suppress(grpc.RpcError):
        await finish(leaving, LEAVE_SECONDS)


async def admit(
    channel: aio.Channel,
    gateway: str,
    request: CreateRequest,
    on_queued: Callable[[Queued], None],
) -> Assigned:
    """Wait for a node; cancelling this takes the build out of the queue.

    Raises:
        GatewayUnreachableError: no answer.
        OffloadError: the gateway refuses: unknown project, no right, queue too long.
    """
    stub = BuildsServiceStub(channel)
    call = stub.Create(request, metadata=call_metadata())
    build_id = ""
    try:
        async for message in call:
            if message.WhichOneof("state") == "assigned":
                return message.assigned
            build_id = message.queued.build_id
            on_queued(message.queued)
    except asyncio.CancelledError:
        # The gateway keeps the place of a client that vanishes, for it may come back.
        if build_id:
            await leave(channel, build_id)
        raise
    except grpc.RpcError as error:
        raise error_from_rpc(
            error,  # type: ignore[arg-type]
            peer=f"the gateway at {gateway}",
            unreachable=GatewayUnreachableError,
        ) from error
    finally:
        call.cancel()
    raise GatewayUnreachableError(f"the gateway at {gateway} ended the call without a node")

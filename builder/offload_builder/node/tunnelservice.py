"""`offload.v1.TunnelService`: connectors bring the connections that builds of this node want."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from grpc.aio import AbortError

from offload_builder.node.services import member_identity
from offload_core.errors import NodeLostError, QuotaExceededError, UsageError
from offload_core.interceptors import abort_with
from offload_proto.v1.connector_service_pb2_grpc import TunnelServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from offload_builder.egress.connectors.tunnels import Tunnels
    from offload_proto.v1.connector_service_pb2 import CarryRequest, CarryResponse

OPEN_SECONDS = 10.0
END_SECONDS = 2.0
MAX_CALLS = 1024
"""Of one member at a time, those of connectors that take nothing included."""


class TunnelService(TunnelServiceServicer):
    """The call's identifier, which this node made up, says what a connector may carry."""

    def __init__(self, tunnels: Tunnels) -> None:
        self._tunnels = tunnels
        self._calls: Counter[str] = Counter()
        """Open calls by member."""

    async def Carry(  # noqa: N802 - name of the RPC
        self, request_iterator: AsyncIterator[CarryRequest], context: Any
    ) -> AsyncIterator[CarryResponse]:
        """Carry one connection of a build; see the .proto file."""
        member = member_identity(context).name
        if self._calls[member] >= MAX_CALLS:
            raise QuotaExceededError(f"{member} has {MAX_CALLS} connections to this node already")
        self._calls[member] += 1
        try:
            async with aclosing(self._carry(aiter(request_iterator), context)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._calls[member] -= 1
            if not self._calls[member]:
                del self._calls[member]

    async def _carry(
        self, requests: AsyncIterator[CarryRequest], context: Any
    ) -> AsyncGenerator[CarryResponse, None]:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("message") != "open":
            raise UsageError("the first message of this call must be Open")
        tunnel = self._tunnels.claim(first.open.call_id)
        try:
            async with aclosing(tunnel.carry(requests)) as responses:
                async for response in responses:
                    yield response
        except GeneratorExit:
            if tunnel.was_cut:
                # While the connector did not take what it was sent. It hears of the end when it
                # does; whoever takes nothing at all is not waited for.
                with suppress(TimeoutError, AbortError):
                    async with asyncio.timeout(END_SECONDS):
                        await abort_with(context, NodeLostError("the connection was cut"))
            raise

"""Calls to the gateway, with its errors as ours."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import grpc

from offload_core.errors import GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.settings import Settings
    from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceAsyncStub
    from offload_proto.v1.cache_service_pb2_grpc import CacheServiceAsyncStub
    from offload_proto.v1.connector_service_pb2_grpc import ConnectorServiceAsyncStub
    from offload_proto.v1.egress_service_pb2_grpc import EgressServiceAsyncStub
    from offload_proto.v1.identity_service_pb2_grpc import (
        AdminServiceAsyncStub,
        IdentityServiceAsyncStub,
    )
    from offload_proto.v1.sessions_service_pb2_grpc import SessionsServiceAsyncStub

CALL_SECONDS = 15.0


class GatewayCalls:
    """The services of one gateway for one command.

    Messages of services that a command does not use are not even imported.
    """

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self._channel = channel

    @cached_property
    def builds(self) -> BuildsServiceAsyncStub:
        """The calls about builds."""
        from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub

        return BuildsServiceStub(self._channel)

    @cached_property
    def identity(self) -> IdentityServiceAsyncStub:
        """The calls about who the caller is."""
        from offload_proto.v1.identity_service_pb2_grpc import IdentityServiceStub

        return IdentityServiceStub(self._channel)

    @cached_property
    def admin(self) -> AdminServiceAsyncStub:
        """The calls of administrators."""
        from offload_proto.v1.identity_service_pb2_grpc import AdminServiceStub

        return AdminServiceStub(self._channel)

    @cached_property
    def cache(self) -> CacheServiceAsyncStub:
        """The calls about the cache."""
        from offload_proto.v1.cache_service_pb2_grpc import CacheServiceStub

        return CacheServiceStub(self._channel)

    def egress(self) -> EgressServiceAsyncStub:
        """Return the calls about what builds may reach, which few commands need."""
        from offload_proto.v1.egress_service_pb2_grpc import EgressServiceStub

        return EgressServiceStub(self._channel)

    def connectors(self) -> ConnectorServiceAsyncStub:
        """Return the calls about connectors."""
        from offload_proto.v1.connector_service_pb2_grpc import ConnectorServiceStub

        return ConnectorServiceStub(self._channel)

    def sessions(self) -> SessionsServiceAsyncStub:
        """Return the calls about sessions."""
        from offload_proto.v1.sessions_service_pb2_grpc import SessionsServiceStub

        return SessionsServiceStub(self._channel)

    @classmethod
    async def open(
        cls, invocation: Invocation, settings: Settings, connections: Connections
    ) -> GatewayCalls:
        """Return the calls for the configured gateway.

        Raises:
            AuthenticationError: not logged in.
        """
        identity = await connections.identity(invocation, settings.gateway)
        return cls(settings.gateway, await connections.gateway(settings.gateway, identity))

    async def call(self, method: Any, request: Any, *, timeout: float = CALL_SECONDS) -> Any:
        """Await a unary call, at most `timeout` seconds.

        Raises:
            OffloadError: what the gateway says, or that it does not answer.
        """
        try:
            return await method(request, timeout=timeout, metadata=call_metadata())
        except grpc.RpcError as error:
            raise self._translated(error) from error

    async def stream(self, method: Any, request: Any) -> AsyncIterator[Any]:
        """Yield the messages of a stream.

        Raises:
            OffloadError: what the gateway says, or that it does not answer.
        """
        call = method(request, metadata=call_metadata())
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise self._translated(error) from error
        finally:
            call.cancel()

    def _translated(self, error: grpc.RpcError) -> Exception:
        return error_from_rpc(
            error,  # type: ignore[arg-type]
            peer=f"the gateway at {self.address}",
            unreachable=GatewayUnreachableError,
        )

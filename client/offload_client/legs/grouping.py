"""Which platforms go to one node, as the gateway sees its pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from offload_core.errors import GatewayUnreachableError
from offload_core.status import error_from_rpc
from offload_core.tls import GATEWAY_NAME
from offload_core.versions import call_metadata
from offload_proto.v1.builds_service_pb2 import PlanPlatformsRequest
from offload_proto.v1.builds_service_pb2_grpc import BuildsServiceStub

if TYPE_CHECKING:
    from grpc import aio

    from offload_client.build.options import BuildOptions
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.settings import Settings

PLAN_SECONDS = 15.0


async def platform_groups(
    options: BuildOptions,
    settings: Settings,
    connections: Connections,
    identity: StoredIdentity,
) -> list[tuple[str, ...]]:
    """Return several platforms of a build, those together that one node is to build.

    Raises:
        PlatformUnavailableError: no node of the pool builds one of them.
        GatewayUnreachableError: no answer, also over a fresh connection.
        OffloadError: what the gateway says.
    """
    whole = [tuple(options.platforms)]
    gateway = settings.gateway
    request = PlanPlatformsRequest(project_id=settings.project, platforms=options.platforms)
    channel = await connections.gateway(gateway, identity)
    try:
        return await _ask(channel, gateway, request) or whole
    except GatewayUnreachableError:
        if not connections.persistent:
            raise
    # A kept connection may turn out dead.
    connections.drop(gateway, GATEWAY_NAME, identity)
    channel = await connections.gateway(gateway, identity)
    return await _ask(channel, gateway, request) or whole


async def _ask(
    channel: aio.Channel, gateway: str, request: PlanPlatformsRequest
) -> list[tuple[str, ...]]:
    """Return the groups; none from a gateway that does not know of them."""
    try:
        reply = await BuildsServiceStub(channel).PlanPlatforms(
            request, timeout=PLAN_SECONDS, metadata=call_metadata()
        )
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return []
        raise error_from_rpc(
            error,  # type: ignore[arg-type]
            peer=f"the gateway at {gateway}",
            unreachable=GatewayUnreachableError,
        ) from error
    return [tuple(group.platforms) for group in reply.groups]

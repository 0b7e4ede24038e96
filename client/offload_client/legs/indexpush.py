"""Pushing the index of an image whose parts the nodes have pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from offload_client.build.callerrors import node_error
from offload_client.build.finishedimage import PUSH_SECONDS, logins_for
from offload_proto.v1.node_service_pb2 import PushIndexRequest
from offload_proto.v1.node_service_pb2_grpc import NodeBuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.build.imagesource import NodeImageSource
    from offload_proto.v1.node_service_pb2 import PushIndexResponse


async def push_index(
    source: NodeImageSource,
    build_id: str,
    parts: Sequence[str],
    names: Sequence[str],
    *,
    platforms: Sequence[str],
    insecure: bool,
    environment: Mapping[str, str],
) -> PushIndexResponse:
    """Let a node push one index, with the user's logins or those of the pool.

    Args:
        source: of a build that has pushed a part.
        build_id: of that build.
        parts: digests of the indexes that were pushed.
        names: normalised image names.
        platforms: of the whole build, in its order.
        insecure: the registry need not prove who it is.
        environment: for docker's logins.

    Raises:
        RegistryAuthError: a registry refuses the login.
        ConfigError: docker's configuration cannot be read.
        OffloadError: what the node says.
    """
    request = PushIndexRequest(
        build_id=build_id,
        names=names,
        logins=await logins_for(names, environment),
        parts=parts,
        platforms=platforms,
        insecure=insecure,
    )
    try:
        return await NodeBuildsServiceStub(source.channel).PushIndex(
            request, metadata=source.metadata, timeout=PUSH_SECONDS
        )
    except grpc.RpcError as error:
        raise node_error(error) from error  # type: ignore[arg-type]

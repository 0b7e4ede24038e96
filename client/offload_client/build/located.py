"""Finding a build that exists already, and the way to its node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.errors import NodeLostError
from offload_proto.v1.builds_service_pb2 import BuildState, LocateRequest

if TYPE_CHECKING:
    from grpc import aio

    from offload_client.connections import Connections
    from offload_client.gateway import GatewayCalls
    from offload_client.identity import StoredIdentity
    from offload_proto.v1.builds_service_pb2 import Build, LocateResponse, SignedTicket

ENDED = frozenset(
    (
        BuildState.BUILD_STATE_SUCCEEDED,
        BuildState.BUILD_STATE_FAILED,
        BuildState.BUILD_STATE_CANCELED,
        BuildState.BUILD_STATE_LOST,
    )
)


@dataclass(frozen=True)
class Place:
    """Where a build is."""

    build_id: str
    node_id: str
    endpoints: tuple[str, ...]
    """HOST:PORT, to be tried in order; none when the node is not attached."""
    server_name: str


async def locate_saved(calls: GatewayCalls, build_id: str) -> tuple[Place, SignedTicket] | None:
    """Return a node that can give the saved image of a build, and the proof for it, or None.

    Raises:
        OffloadError: the gateway does not answer, or refuses.
    """
    request = LocateRequest(build_id=build_id, saved_image=True)
    reply: LocateResponse = await calls.call(calls.builds.Locate, request)
    if not reply.HasField("saved_image"):
        return None
    found = reply.saved_image
    place = Place(build_id, found.node_id, tuple(found.endpoints), found.server_name)
    return place, found.ticket


async def locate(calls: GatewayCalls, build_id: str) -> tuple[Build, Place]:
    """Ask the gateway for a build of the caller.

    Args:
        calls: to the gateway.
        build_id: or the beginning of it.

    Raises:
        NotFoundError: there is none, or several begin like this.
        OffloadError: the gateway does not answer, or refuses.
    """
    found: LocateResponse = await calls.call(calls.builds.Locate, LocateRequest(build_id=build_id))
    build = found.build
    place = Place(build.build_id, build.node_id, tuple(found.endpoints), found.server_name)
    return build, place


async def connect_to(
    place: Place, connections: Connections, identity: StoredIdentity
) -> aio.Channel:
    """Return a channel to the node of a build.

    Raises:
        NodeLostError: it does not answer; with `connection_broke`, as it may come back.
    """
    channel = None
    if place.endpoints:
        channel = await connections.connect(place.endpoints, place.server_name, identity)
    if channel is not None:
        return channel
    where = f" at {', '.join(place.endpoints)}" if place.endpoints else ""
    error = NodeLostError(f"node {place.node_id or 'of the build'} does not answer{where}")
    error.connection_broke = True
    raise error


def forget_connections(place: Place, connections: Connections, identity: StoredIdentity) -> None:
    """Use no connection to the node again that was open until now; it may be dead unnoticed."""
    for endpoint in place.endpoints:
        connections.drop(endpoint, place.server_name, identity)

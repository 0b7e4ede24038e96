"""The image of a build that has ended, at the node that has it."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from offload_client.build.callerrors import node_error
from offload_client.build.imagesource import NodeImageSource
from offload_client.build.located import ENDED, connect_to, locate, locate_saved
from offload_client.bytepipe import in_thread
from offload_client.dockerauth import credentials_for
from offload_core.errors import NodeLostError, NotFoundError, OffloadError, UsageError
from offload_core.reference import split_reference
from offload_core.versions import call_metadata
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.node_service_pb2 import PushImageRequest, RegistryLogin
from offload_proto.v1.node_service_pb2_grpc import NodeBuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from grpc import aio

    from offload_client.connections import Connections
    from offload_client.gateway import GatewayCalls
    from offload_client.identity import StoredIdentity
    from offload_proto.v1.builds_service_pb2 import Build

PUSH_SECONDS = 3600.0
TICKET_KEY = "offload-image-ticket"
HUB = "docker.io"
HUB_HOST = "registry-1.docker.io"


@dataclass(frozen=True)
class FinishedImage:
    """An image that can be read and pushed."""

    build_id: str
    digest: str
    """Of the manifest or index."""
    channel: aio.Channel = field(repr=False)
    ticket: str = field(default="", repr=False)
    """Proof for a node that did not build it."""

    @property
    def source(self) -> NodeImageSource:
        """Its content."""
        return NodeImageSource(self.channel, self._metadata())

    async def push(self, names: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
        """Let the node push it, with the user's logins; return digest and bytes that were sent.

        Args:
            names: normalised image names.
            environment: for docker's logins.

        Raises:
            RegistryAuthError: a registry refuses the login.
            ConfigError: docker's configuration cannot be read.
            OffloadError: what the node says.
        """
        logins = await logins_for(names, environment)
        request = PushImageRequest(build_id=self.build_id, names=names, logins=logins)
        try:
            reply = await NodeBuildsServiceStub(self.channel).PushImage(
                request, metadata=self._metadata(), timeout=PUSH_SECONDS
            )
        except grpc.RpcError as error:
            raise node_error(error) from error  # type: ignore[arg-type]
        return reply.digest, reply.sent_bytes

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        named = ("offload-build-id", self.build_id)
        return (
            call_metadata(named, (TICKET_KEY, self.ticket)) if self.ticket else call_metadata(named)
        )


async def find_image(
    build_id: str, calls: GatewayCalls, connections: Connections, identity: StoredIdentity
) -> FinishedImage:
    """Find the image of a build of the caller.

    Args:
        build_id: or the beginning of it.
        calls: to the gateway.
        connections: of the command.
        identity: of the user.

    Raises:
        NotFoundError: there is no such build, or it has no image, or nobody has it any more.
        UsageError: the build has not ended well.
        NodeLostError: the node does not answer.
    """
    build, place = await locate(calls, build_id)
    state = BuildState.Name(build.state).removeprefix("BUILD_STATE_").lower()
    if build.state not in ENDED:
        raise UsageError(
            f"build {build.build_id} is {state}; its image is there when it has ended",
            hint=f"wait for it with: offload attach {build.build_id}",
        )
    if build.state != BuildState.BUILD_STATE_SUCCEEDED:
        repeated = f"it was repeated as {build.repeated_by}" if build.repeated_by else ""
        raise UsageError(
            f"build {build.build_id} has no image: it has ended as {state}", hint=repeated
        )
    if not build.image_digest:
        raise NotFoundError(
            f"build {build.build_id} has made no image",
            hint="an image is kept of builds with -t, --load, --push, --detach or --save",
        )
    if not place.endpoints and not build.image_saved:
        raise NotFoundError(
            f"node {place.node_id}, which has the image of build {build.build_id}, is not attached",
            hint="an image of a build with --save is there without its node, once it is stored",
        )
    image: FinishedImage | None = None
    problem: OffloadError = NotFoundError(
        f"the image of build {build.build_id} is in the shared store, but no node can give it now"
    )
    try:
        channel = await connect_to(place, connections, identity)
        image = FinishedImage(build.build_id, build.image_digest, channel)
        if build.image_saved:
            await image.source.manifest(image.digest)
    except (NodeLostError, NotFoundError) as error:
        # Another node can give what was saved.
        if not build.image_saved:
            raise
        if place.endpoints:
            problem = error
        image = None
    return image or await _from_another(build, calls, connections, identity, problem)


async def _from_another(
    build: Build,
    calls: GatewayCalls,
    connections: Connections,
    identity: StoredIdentity,
    problem: OffloadError,
) -> FinishedImage:
    """Find a saved image at a node that did not build it.

    Raises:
        OffloadError: `problem`, when there is no such node, or what that node says.
    """
    found = await locate_saved(calls, build.build_id)
    if found is None:
        raise problem
    place, signed = found
    ticket = base64.b64encode(signed.SerializeToString()).decode()
    channel = await connect_to(place, connections, identity)
    image = FinishedImage(build.build_id, build.image_digest, channel, ticket)
    await image.source.manifest(image.digest)
    return image


async def logins_for(
    names: Sequence[str], environment: Mapping[str, str]
) -> dict[str, RegistryLogin]:
    """Return docker's logins for a node, by host, at the registries of normalised image names.

    Raises:
        ConfigError: docker's configuration cannot be read.
    """
    hosts = list(dict.fromkeys(split_reference(name)[0] for name in names))
    return await in_thread(lambda: _logins_at(hosts, environment), name="credentials")


def _logins_at(hosts: Sequence[str], environment: Mapping[str, str]) -> dict[str, RegistryLogin]:
    found: dict[str, RegistryLogin] = {}
    for host in hosts:
        login = credentials_for(HUB_HOST if host == HUB else host, environment)
        if login is not None:
            entry = RegistryLogin(username=login.username, secret=login.secret)
            found[host] = entry
            if host == HUB:
                found[HUB_HOST] = entry
    return found

"""The way to a session: where its node is, and connections to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from offload_client.gateway import GatewayCalls
from offload_core.errors import NodeLostError, NotFoundError, SessionGoneError
from offload_proto.v1 import sessions_service_pb2 as pb
from offload_proto.v1.sessions_service_pb2_grpc import SessionsServiceStub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpc import aio

    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.sessions.records import SessionRecord

WAKE_SECONDS = 90.0
GONE = (pb.SESSION_STATE_ENDED, pb.SESSION_STATE_LOST, pb.SESSION_STATE_FAILED)
CONNECTION_OPTIONS = (
    # One that has failed leaves its back-off to no other.
    ("grpc.use_local_subchannel_pool", 1),
    # Where nothing comes back any more, people wait for docker; the library gives up after 60 s.
    ("grpc.http2.ping_timeout_ms", 15_000),
)
"""Of connections that a session is kept by."""


@dataclass(frozen=True, slots=True)
class SessionPlace:
    """Where a session is.

    Attributes:
        endpoints: HOST:PORT of its node, to be tried in this order.
        server_name: of its node.
        state: SessionState.
    """

    endpoints: tuple[str, ...]
    server_name: str
    state: int


@dataclass(frozen=True, slots=True)
class NodeChannel:
    """A connection to a node.

    Attributes:
        channel: of gRPC.
        expires_at: when the certificate of it ends, in seconds since 1970 UTC.
    """

    channel: aio.Channel
    expires_at: float


class SessionAccess(Protocol):
    """Finds a session, and connects to its node."""

    async def find(self, *, wake: bool) -> SessionPlace:
        """Return where it is.

        Args:
            wake: start its engine if it is paused.

        Raises:
            SessionGoneError: it has ended.
            OffloadError: the gateway does not answer, or refuses.
        """

    async def connect(self, place: SessionPlace) -> NodeChannel:
        """Connect to its node.

        Raises:
            NodeLostError: none of its addresses answers.
        """

    def give_up(self, channel: NodeChannel) -> None:
        """Close a connection once its last call has ended."""


class GatewayAccess:
    """Access by the gateway of a session, as the member whose configuration there is."""

    def __init__(
        self, invocation: Invocation, connections: Connections, record: SessionRecord
    ) -> None:
        """Prepare.

        Args:
            invocation: says where the member's certificate is.
            connections: with channels of their own connections.
            record: of the session.
        """
        self._invocation = invocation
        self._connections = connections
        self._record = record

    async def find(self, *, wake: bool) -> SessionPlace:
        """Return where it is; see `SessionAccess`."""
        gateway = self._record.gateway
        identity = await self._identity()
        channel = await self._connections.gateway(gateway, identity)
        calls = GatewayCalls(gateway, channel)
        request = pb.OpenSessionRequest(session_id=self._record.session_id, keep_paused=not wake)
        try:
            reply: pb.OpenSessionResponse = await calls.call(
                SessionsServiceStub(channel).OpenSession, request, timeout=WAKE_SECONDS
            )
        except NotFoundError as error:
            raise SessionGoneError(error.message, hint=error.hint) from error
        if reply.session.state in GONE:
            raise SessionGoneError(
                reply.session.reason or "the session has ended", hint="run 'offload start'"
            )
        return SessionPlace(tuple(reply.endpoints), reply.server_name, reply.session.state)

    async def connect(self, place: SessionPlace) -> NodeChannel:
        """Connect to its node; see `SessionAccess`."""
        identity = await self._identity()
        channel = await self._connections.connect(place.endpoints, place.server_name, identity)
        if channel is None:
            tried: Sequence[str] = place.endpoints or ("no address",)
            raise NodeLostError(f"the session's node does not answer at {', '.join(tried)}")
        return NodeChannel(channel, identity.expires_at)

    def give_up(self, channel: NodeChannel) -> None:
        """Close a connection once its last call has ended."""
        self._connections.discard(channel.channel)

    async def _identity(self) -> StoredIdentity:
        return await self._connections.identity(self._invocation, self._record.gateway)

"""A whole node: identity, agent, gRPC listener, link to the gateway."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

import structlog
from grpc import aio

from offload_builder.datalock import DataLock
from offload_builder.egress.held import HeldPolicies
from offload_builder.metricsport import MetricsPort
from offload_builder.node.agent import NodeAgent
from offload_builder.node.enrolment import ensure_identity
from offload_builder.node.proxy.server import BuildkitPort
from offload_builder.node.renewal import IdentityKeeper
from offload_builder.node.services import Blobs, NodeBuilds
from offload_builder.node.sessions.service import SessionNode, add_session_node
from offload_builder.node.sessions.sessionmetrics import SessionMetrics
from offload_builder.node.sessions.sync.places import SyncPlaces
from offload_builder.node.sessions.sync.service import SessionSyncService
from offload_builder.node.tunnelservice import TunnelService
from offload_builder.revocations import RevocationGate, Revocations
from offload_core.errors import ConfigError
from offload_core.interceptors import ErrorInterceptor
from offload_core.servercredentials import ReloadingCredentials
from offload_core.tls import SERVER_OPTIONS
from offload_core.trust import join_address, split_address
from offload_proto.v1.connector_service_pb2_grpc import add_TunnelServiceServicer_to_server
from offload_proto.v1.node_service_pb2_grpc import (
    add_BlobsServiceServicer_to_server,
    add_NodeBuildsServiceServicer_to_server,
)
from offload_proto.v1.session_sync_service_pb2_grpc import add_SessionSyncServiceServicer_to_server

if TYPE_CHECKING:
    from types import TracebackType

    from offload_builder.node.config import NodeConfig
    from offload_core.tls import KeyPair

log = structlog.get_logger(__name__)

STOP_SECONDS = 5.0
DEFAULT_PORT = 7450
LOCK_SECONDS = 10.0
"""For a predecessor that is about to end."""
MAX_CALLS = 1024
"""Calls at a time; a client uses about three per build. Each session can have as many."""


class NodeServer:
    """Async context manager; `run` serves until cancelled."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.agent: NodeAgent
        self.revocations: Revocations
        self.policies: HeldPolicies
        self.credentials: ReloadingCredentials
        self._keeper: IdentityKeeper
        self.buildkit_port: BuildkitPort
        self.metrics_port: MetricsPort
        self.address = ""
        self._stack = AsyncExitStack()
        self._errors = ErrorInterceptor("this node")

    async def __aenter__(self) -> Self:
        """Start to listen; `run` attaches to the gateway.

        Raises:
            ConfigError: data directory, identity or address cannot be used.
            GatewayUnreachableError: the node is not enrolled and the gateway does not answer.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(
                DataLock(self.config.data, "this node", patience=LOCK_SECONDS)
            )
            identity = await ensure_identity(self.config)
            self.policies = await stack.enter_async_context(
                HeldPolicies(self.config.data / "egress.json")
            )
            self.agent = await stack.enter_async_context(
                NodeAgent(self.config, identity, self.policies)
            )
            self.revocations = Revocations(self.config.data / "revocations.json")
            credentials = self.credentials = ReloadingCredentials(identity.keys)
            self._keeper = IdentityKeeper(self.config, identity, self._use)
            self.agent.link.handlers["revocations"] = self.revocations.take_message
            self.agent.link.handlers["egress_policies"] = self.policies.take_message
            # Whoever has applied a policy waits for it.
            self.policies.on_outcome = self.agent.link.beat
            self.agent.link.handlers["served_destinations"] = self.agent.isolation.take_served
            self.agent.link.handlers["call_refused"] = self.agent.isolation.tunnels.take_message
            self.agent.link.handlers["authorities"] = self._keeper.take_authorities
            server = aio.server(
                interceptors=(RevocationGate(self.revocations), self._errors),
                options=SERVER_OPTIONS,
                maximum_concurrent_rpcs=MAX_CALLS * (1 + self.config.session_slots),
            )
            add_NodeBuildsServiceServicer_to_server(NodeBuilds(self.agent), server)
            add_BlobsServiceServicer_to_server(Blobs(self.agent), server)
            add_TunnelServiceServicer_to_server(TunnelService(self.agent.isolation.tunnels), server)
            add_session_node(SessionNode(self.agent.sessions), server)
            places = SyncPlaces(self.agent.sessions, self.agent.context_store)
            add_SessionSyncServiceServicer_to_server(
                SessionSyncService(self.agent.copies, places.open), server
            )
            host, port = split_address(self.config.listen, default_port=DEFAULT_PORT)
            try:
                bound = server.add_secure_port(
                    join_address(host, port), credentials.server(require_client=True)
                )
            except RuntimeError as error:
                raise ConfigError(
                    f"cannot listen on {self.config.listen}; is the port in use?"
                ) from error
            self.address = join_address(host, bound)
            self.agent.facts.listening = _reachable(self.address, self.config.gateway)
            buildkit = self.buildkit_port = await stack.enter_async_context(
                BuildkitPort(self.config, self.agent, self.revocations)
            )
            self.agent.facts.buildkit_address = self.config.buildkit_relay_address or _reachable(
                buildkit.address, self.config.gateway
            )
            isolation = self.agent.isolation
            isolation.metrics.register(self.agent.gauges())
            isolation.metrics.register(SessionMetrics(self.agent.sessions))
            self.metrics_port = await stack.enter_async_context(
                MetricsPort(
                    self.config.metrics_address, isolation.metrics, isolation.counts.refresh
                )
            )
            stack.push_async_callback(self._stop, server)
            await server.start()
            self._stack = stack.pop_all()
        log.info("node.listening", node_id=identity.node_id, address=self.address)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _stop(self, server: aio.Server) -> None:
        await server.stop(STOP_SECONDS)
        await self._errors.drained(STOP_SECONDS)

    async def run(self) -> None:
        """Stay attached to the gateway until cancelled, then drain."""
        link = asyncio.ensure_future(self.agent.link.run())
        keeper = asyncio.ensure_future(self._keeper.run())
        try:
            await asyncio.shield(link)
        except asyncio.CancelledError:
            if not link.done():
                self.buildkit_port.drain()
                await self.agent.drain()
            raise
        finally:
            keeper.cancel()
            link.cancel()
            await asyncio.wait((link, keeper))

    def _use(self, keys: KeyPair) -> None:
        """Serve and attach with another certificate from now on."""
        self.agent.identity = self._keeper.identity
        self.credentials.use(keys)
        self.agent.link.use(keys)
        self.buildkit_port.use(keys)


def _reachable(address: str, gateway: str) -> str:
    """Return the address under which a peer finds a listener at all of this machine's addresses."""
    host, port = split_address(address)
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - it is what is compared
        return address
    try:
        found = socket.getaddrinfo(*split_address(gateway), type=socket.SOCK_DGRAM)
        family, _, _, _, target = found[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Sends nothing; the kernel only chooses the route and with it our address.
            probe.connect(target)
            return join_address(probe.getsockname()[0], port)
    except OSError as error:
        log.warning("node.address.unknown", gateway=gateway, error=str(error))
        return address

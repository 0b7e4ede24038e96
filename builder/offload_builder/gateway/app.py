"""The gateway as one object: `async with Gateway(config) as gateway`."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog
from grpc import aio

from offload_builder.gateway.access import Access
from offload_builder.gateway.active_builds import ActiveBuilds
from offload_builder.gateway.admin_service import AdminService
from offload_builder.gateway.admission import Admission
from offload_builder.gateway.audit import AuditLog
from offload_builder.gateway.auditcalls import AuditInterceptor
from offload_builder.gateway.buildkitrefusal import BuildkitRefusal
from offload_builder.gateway.buildkitroute import choose_node
from offload_builder.gateway.builds_service import BuildsService
from offload_builder.gateway.ca import CertificateAuthority
from offload_builder.gateway.cache_service import CacheService
from offload_builder.gateway.cachework import CacheWork
from offload_builder.gateway.cakeeper import CaKeeper
from offload_builder.gateway.connector_service import ConnectorService
from offload_builder.gateway.connectors import ConnectorBoard
from offload_builder.gateway.credentials import RenewingCredentials
from offload_builder.gateway.egress_service import EgressService
from offload_builder.gateway.egressfeed import EgressFeed
from offload_builder.gateway.egresslearning import EgressLearning
from offload_builder.gateway.egressnodes import EgressNodes
from offload_builder.gateway.egresspolicies import EgressPolicies
from offload_builder.gateway.front import Front, Route, TcpRoute, UnixRoute
from offload_builder.gateway.gatewaymetrics import gateway_metrics
from offload_builder.gateway.history import History
from offload_builder.gateway.housekeeping import Housekeeping
from offload_builder.gateway.identity_service import (
    CertificateIssuer,
    EnrollmentService,
    IdentityService,
)
from offload_builder.gateway.log_book import LogBook
from offload_builder.gateway.logretention import LogRetention
from offload_builder.gateway.members import DEFAULT_PROJECT, Members
from offload_builder.gateway.nodeadmission import NodeAdmission
from offload_builder.gateway.nodes import NodeRegistry
from offload_builder.gateway.nodes_service import NodesService
from offload_builder.gateway.oidc.exchange import Exchange
from offload_builder.gateway.projectbounds import BoundsFeed, BoundsTable
from offload_builder.gateway.ratelimits import LoginLimits
from offload_builder.gateway.revocationfeed import RevocationFeed
from offload_builder.gateway.scheduler import QueuedBuild, waiting_reason
from offload_builder.gateway.sessions.service import SessionsService
from offload_builder.gateway.sessions.sessions import Sessions
from offload_builder.gateway.steptimes import StepTimes
from offload_builder.gateway.store import Store, default_url
from offload_builder.gateway.tracking import BuildTracking
from offload_builder.metricsport import MetricsPort
from offload_builder.revocations import RevocationGate
from offload_core.aio import TaskSet, finish
from offload_core.errors import ConfigError, InternalError
from offload_core.interceptors import ErrorInterceptor
from offload_core.tls import (
    BUILDKIT_SUFFIX,
    ENROLL_NAME,
    GATEWAY_NAME,
    NODE_SUFFIX,
    SERVER_OPTIONS,
)
from offload_core.trust import split_address
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.builds_service_pb2_grpc import add_BuildsServiceServicer_to_server
from offload_proto.v1.cache_service_pb2_grpc import add_CacheServiceServicer_to_server
from offload_proto.v1.connector_service_pb2_grpc import add_ConnectorServiceServicer_to_server
from offload_proto.v1.egress_service_pb2_grpc import add_EgressServiceServicer_to_server
from offload_proto.v1.identity_service_pb2_grpc import (
    add_AdminServiceServicer_to_server,
    add_EnrollmentServiceServicer_to_server,
    add_IdentityServiceServicer_to_server,
)
from offload_proto.v1.nodes_service_pb2_grpc import add_NodesServiceServicer_to_server
from offload_proto.v1.sessions_service_pb2_grpc import add_SessionsServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Collection

    from offload_builder.gateway.config import GatewayConfig

log = structlog.get_logger(__name__)

NODE_TOKEN_LIFE = timedelta(days=1)
BOOTSTRAP_ADMIN = "admin"
_CLOSE_SECONDS = 30.0
_ATTACH_POLL_SECONDS = 0.02


async def open_members(
    config: GatewayConfig, stack: AsyncExitStack
) -> tuple[CertificateAuthority, Store, Members]:
    """Open what the gateway's data directory holds, for the gateway and for commands beside it.

    Raises:
        ConfigError: the directory or the database cannot be used.
    """
    authority = CertificateAuthority.open(config.data_dir)
    url = config.database_url or default_url(config.data_dir)
    store = await stack.enter_async_context(Store(url))
    return authority, store, Members(store, authority.fingerprint)


class Gateway:
    """One gateway process: identity, admission, scheduling, history and the relay."""

    def __init__(self, config: GatewayConfig) -> None:
        """Remember the configuration; nothing is opened yet."""
        self._config = config
        self._stack = AsyncExitStack()
        self._sockets: Path | None = None
        self._front: Front | None = None
        self._nodes: NodeRegistry | None = None
        self._builds: ActiveBuilds | None = None
        self._first_token: str | None = None
        self._members: Members | None = None
        self._authority: CertificateAuthority | None = None
        self.metrics_port: MetricsPort

    @property
    def address(self) -> str:
        """HOST:PORT on which the gateway listens."""
        return self._front.address if self._front is not None else ""

    @property
    def ca_pem(self) -> bytes:
        """PEM of the CAs to trust, once started."""
        return self._authority.ca_pem if self._authority is not None else b""

    def take_first_token(self) -> str | None:
        """Return the administrator's token that the first start has made, once."""
        token, self._first_token = self._first_token, None
        return token

    async def __aenter__(self) -> Self:
        """Start everything; nothing listens before all of it works.

        Raises:
            ConfigError: data directory, database or address cannot be used.
        """
        try:
            await self._start()
        except BaseException:
            await finish(self._stack.aclose(), _CLOSE_SECONDS)
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop: no new work, calls told to come back, history written, files closed."""
        log.info("gateway.stopping")
        await finish(self._stack.aclose(), _CLOSE_SECONDS + self._config.stop_timeout)
        log.info("gateway.stopped")

    async def create_node_token(self, node_id: str) -> str:
        """Return a new enrolment token for one node, as text."""
        if self._members is None:
            raise InternalError("the gateway is not started")
        _, text = await self._members.create_token(
            name=node_id,
            role=identity_pb.ROLE_NODE,
            expires_at=datetime.now(UTC) + NODE_TOKEN_LIFE,
        )
        return text.reveal()

    def attached_nodes(self) -> list[str]:
        """Return the names of the nodes that are connected now."""
        return [node.node_id for node in self._nodes.connected()] if self._nodes else []

    async def wait_for_nodes(self, names: Collection[str]) -> None:
        """Wait until all named nodes are connected; bound it with a timeout."""
        while not set(names) <= set(self.attached_nodes()):  # noqa: ASYNC110 - only at start-up
            await asyncio.sleep(_ATTACH_POLL_SECONDS)

    async def _start(self) -> None:
        config, stack = self._config, self._stack
        authority, store, members = await open_members(config, stack)
        self._members = members
        self._authority = authority
        await self._bootstrap(members)
        history = History(store)
        logs = LogBook(store, config.max_log_bytes_per_build)
        stack.push_async_callback(logs.flush)
        tasks = TaskSet(_task_failed)
        stack.push_async_callback(tasks.close)
        nodes = self._nodes = NodeRegistry(config.heartbeat_interval, config.reconnect_grace)
        audit = AuditLog(store)
        builds = self._builds = ActiveBuilds(history, logs.wake_readers)
        stack.callback(builds.close)
        admission = Admission(config, builds, nodes)
        builds.listen(admission.wake)
        tracking = BuildTracking(
            builds, admission, nodes, config.restart_grace, StepTimes(store), audit
        )
        nodes.listen(tracking)
        await tracking.restore()
        sessions = Sessions(config, store, nodes, admission.platforms, members)
        stack.callback(sessions.active.close)
        admission.session_places = sessions.active.places
        await sessions.tracking.restore()
        credentials = RenewingCredentials(authority)
        retention = LogRetention(
            store, keep_bytes=config.logs_keep, retention_seconds=config.logs_retention
        )
        housekeeping = Housekeeping(
            config, credentials, members, nodes, history, retention, audit, sessions
        )
        revocations = RevocationFeed(config, store, nodes, admission, sessions.ending)
        await revocations.refresh()
        authorities = CaKeeper(authority, credentials, nodes, audit)
        bounds = BoundsFeed(BoundsTable(store), nodes)
        tasks.start(logs.run(), name="log-book")
        policies = EgressPolicies(store)
        egress = EgressFeed(policies, nodes)
        tasks.start(bounds.run(), name="project-bounds")
        tasks.start(egress.run(), name="egress-policies")
        tasks.start(EgressNodes(store).keep(nodes), name="egress-nodes")
        tasks.start(revocations.run(), name="revocations")
        tasks.start(authorities.run(), name="authorities")
        tasks.start(nodes.watch(), name="node-watch")
        tasks.start(admission.run(), name="admission")
        tasks.start(housekeeping.run(), name="housekeeping")
        sessions.start(tasks)

        exchange = Exchange(config, members, audit)
        tasks.start(exchange.run(), name="identity-rules")
        access = Access(members)
        issuer = CertificateIssuer(config, authority)
        interceptor = ErrorInterceptor("this gateway")
        interceptors = (RevocationGate(revocations.taken), interceptor, AuditInterceptor(audit))
        enrollment, api = (
            aio.server(interceptors=interceptors, options=SERVER_OPTIONS) for _ in range(2)
        )
        limits = LoginLimits(config)
        add_EnrollmentServiceServicer_to_server(
            EnrollmentService(authority, issuer, members, nodes, exchange, limits), enrollment
        )
        add_IdentityServiceServicer_to_server(
            IdentityService(access, issuer, authority, members, limits), api
        )
        add_AdminServiceServicer_to_server(
            AdminService(access, members, nodes, admission, revocations), api
        )
        builds_service = BuildsService(
            config,
            authority.ticket_key,
            access,
            members,
            admission,
            builds,
            history,
            logs,
            nodes,
            policies,
            self._relay_address,
        )
        add_BuildsServiceServicer_to_server(builds_service, api)
        board = ConnectorBoard(policies, nodes, builds_service.endpoints)
        egress.on_change(board.policies_changed)
        connectors = ConnectorService(access, members, board, audit)
        add_ConnectorServiceServicer_to_server(connectors, api)
        add_NodesServiceServicer_to_server(
            NodesService(
                authority.ticket_public_pem(),
                access,
                nodes,
                tracking,
                logs,
                (revocations, egress, authorities, bounds, board),
                history,
                NodeAdmission(config, authority, access, members, admission, builds_service.place),
                board,
                sessions.tracking,
            ),
            api,
        )
        add_SessionsServiceServicer_to_server(
            SessionsService(config, access, members, nodes, sessions, builds_service.endpoints), api
        )
        add_CacheServiceServicer_to_server(
            CacheService(config, access, members, store, history, CacheWork(nodes)), api
        )
        learning = EgressLearning(store, logs, lambda build_id: builds.find(build_id) is None)
        add_EgressServiceServicer_to_server(
            EgressService(access, members, policies, egress, history, learning), api
        )
        self._sockets = Path(tempfile.mkdtemp(prefix="offload-"))
        stack.callback(shutil.rmtree, self._sockets, ignore_errors=True)
        self._bind(enrollment, ENROLL_NAME, credentials, require_client=False)
        self._bind(api, GATEWAY_NAME, credentials, require_client=True)

        async def stop_servers() -> None:
            for server in (enrollment, api):
                await server.stop(config.stop_timeout)
            if not await interceptor.drained(config.stop_timeout):
                log.warning("gateway.calls_left", seconds=config.stop_timeout)

        def stop_admission() -> None:
            admission.stop()
            sessions.queue.stop()
            logs.stop()
            nodes.close()
            connectors.close()

        refusal = await stack.enter_async_context(
            BuildkitRefusal(
                self._socket(BUILDKIT_SUFFIX.lstrip(".")), credentials.keys, self._why_no_node
            )
        )
        credentials.on_change(lambda: refusal.use(credentials.keys))
        front = self._front = await stack.enter_async_context(Front(config, self._route))
        stack.push_async_callback(stop_servers)
        stack.callback(stop_admission)
        metrics = gateway_metrics(nodes, builds, egress.newest, sessions.active)
        self.metrics_port = await stack.enter_async_context(
            MetricsPort(config.metrics_address, metrics)
        )
        await enrollment.start()
        await api.start()
        stack.callback(front.stop_listening)
        await front.listen()
        log.info("gateway.started", address=self.address, data_dir=str(config.data_dir))

    async def _bootstrap(self, members: Members) -> None:
        """Make what a first start needs; tokens may have been made before by a command."""
        if not await members.list_projects():
            await members.create_project(DEFAULT_PROJECT)
            log.info("project.created", project_id=DEFAULT_PROJECT)
        if not await members.has_admin():
            _, text = await members.create_token(name=BOOTSTRAP_ADMIN, role=identity_pb.ROLE_ADMIN)
            self._first_token = text.reveal()

    def _bind(
        self,
        server: aio.Server,
        name: str,
        credentials: RenewingCredentials,
        *,
        require_client: bool,
    ) -> None:
        path = self._socket(name)
        try:
            server.add_secure_port(
                f"unix:{path}", credentials.server(require_client=require_client)
            )
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on the socket {path}: {error}", hint="set TMPDIR to a shorter path"
            ) from error

    def _socket(self, name: str) -> Path:
        if self._sockets is None:
            raise InternalError("the gateway is not started")
        return self._sockets / f"{name.partition('.')[0]}.sock"

    def _route(self, server_name: str) -> Route | None:
        """Return where a TLS server name leads to."""
        if server_name in (ENROLL_NAME, GATEWAY_NAME):
            return UnixRoute(self._socket(server_name))
        if self._nodes is None:
            return None
        if server_name.endswith(BUILDKIT_SUFFIX):
            return self._buildkit_route(server_name.removesuffix(BUILDKIT_SUFFIX), self._nodes)
        node_id = server_name.removesuffix(NODE_SUFFIX)
        node = self._nodes.find(node_id) if node_id != server_name else None
        return None if node is None else _tcp_route(node_id, node.hello.relay_endpoint)

    def _buildkit_route(self, project_id: str, nodes: NodeRegistry) -> Route | None:
        """Return the node for a client that speaks BuildKit's API."""
        serving = [node for node in nodes.connected() if node.hello.buildkit_endpoint]
        views = [node.view(self._load(node.node_id)) for node in serving]
        waiting = self._builds.waiting_for() if self._builds is not None else None
        chosen = choose_node(project_id, views, waiting)
        node = nodes.find(chosen) if chosen else None
        route = None if node is None else _tcp_route(chosen, node.hello.buildkit_endpoint)
        return route or UnixRoute(self._socket(BUILDKIT_SUFFIX.lstrip(".")))

    def _why_no_node(self, project_id: str) -> str:
        """Return the sentence for a client of BuildKit's API whom no node can serve."""
        views = [node.view(0) for node in self._nodes.connected()] if self._nodes else []
        wish = QueuedBuild("", project_id, 0)
        reason = waiting_reason(wish, views)
        if reason == "other builds are before it":
            reason = "no node serves BuildKit's API"
        return f"no node can take your connection: {reason}; try again later"

    def _load(self, node_id: str) -> int:
        return self._builds.load(node_id) if self._builds is not None else 0

    def _relay_address(self) -> str:
        """Return what clients dial to reach nodes through this gateway; empty when unknown."""
        if self._config.public_address:
            return self._config.public_address
        host, _ = split_address(self.address)
        return "" if host in ("0.0.0.0", "::") else self.address  # noqa: S104


def _tcp_route(node_id: str, endpoint: str) -> Route | None:
    if not endpoint:
        return None
    try:
        return TcpRoute(*split_address(endpoint))
    except ConfigError as error:
        log.warning("node.endpoint.invalid", node_id=node_id, error=error.message)
        return None


def _task_failed(name: str, error: BaseException) -> None:
    log.error("gateway.task.failed", task=name, exc_info=error)

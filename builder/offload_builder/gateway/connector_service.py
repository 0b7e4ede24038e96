"""ConnectorService: the standing streams of connectors."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from offload_builder.egress.policy.model import HostTarget
from offload_builder.egress.policy.targets import parse_target
from offload_builder.gateway.audit import Event
from offload_builder.gateway.connectors import OnlineConnector
from offload_builder.gateway.peers import peer_host
from offload_builder.gateway.plaintext import plain_line
from offload_core.aio import TaskSet
from offload_core.errors import (
    AccessDeniedError,
    GatewayUnreachableError,
    OffloadError,
    UsageError,
    find_offload_error,
)
from offload_proto.v1 import connector_service_pb2 as connector_pb
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1.connector_service_pb2_grpc import ConnectorServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from grpc import aio

    from offload_builder.gateway.access import Access, Caller
    from offload_builder.gateway.audit import AuditLog
    from offload_builder.gateway.connectors import ConnectorBoard, Destination
    from offload_builder.gateway.members import Members

log = structlog.get_logger(__name__)

HELLO_SECONDS = 10.0
CHECK_SECONDS = 15.0
"""How often it is looked at whether the login behind an open stream still holds."""
MAX_DESTINATIONS = 32
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,38}[A-Za-z0-9])?")
_MAX_REASON = 300


class ConnectorService(ConnectorServiceServicer):
    """Passes messages between the streams of connectors and the board."""

    def __init__(
        self, access: Access, members: Members, board: ConnectorBoard, audit: AuditLog
    ) -> None:
        self._access = access
        self._members = members
        self._board = board
        self._audit = audit
        self._stopping = False
        self._open: set[OnlineConnector] = set()

    def close(self) -> None:
        """Send all connectors away; they come back when the gateway does."""
        self._stopping = True
        for connector in self._open:
            connector.end(_stopping())

    async def Serve(  # noqa: N802
        self,
        request_iterator: AsyncIterator[connector_pb.ServeRequest],
        context: aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[connector_pb.ServeResponse]:
        """Serve one connector until it leaves, or its login ends."""
        caller = await self._access.member(context)
        requests = aiter(request_iterator)
        hello = await _hello(requests)
        event = Event(
            "connector.connected",
            member=caller.token.name,
            role=caller.identity.role,
            token_id=caller.token.token_id,
            project_id=plain_line(hello.project_id, 40),
            address=peer_host(context),
            detail=plain_line(f"{hello.name}: {_shown(hello)}", 400),
        )
        try:
            connector = await self._admitted(caller, hello, event.address)
        except OffloadError as refused:
            self._note(event, refused)
            raise
        self._note(event, None)
        work = TaskSet()
        self._open.add(connector)
        error: OffloadError | None = None
        try:
            work.start(self._read(requests, connector), name=f"connector-{connector.name}")
            work.start(self._watch(caller, connector), name=f"login-{connector.name}")
            while (message := await connector.outbox.get()) is not None:
                if isinstance(message, OffloadError):
                    error = message
                    raise message
                yield message
        finally:
            self._open.discard(connector)
            self._board.remove(connector)
            self._note(_left(event), error)
            await work.close()

    async def ListConnectors(  # noqa: N802
        self,
        request: connector_pb.ListConnectorsRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> connector_pb.ListConnectorsResponse:
        """Return the connectors of a project that are online."""
        caller = await self._access.member(context)
        caller.token.check_project(request.project_id)
        await self._members.project(request.project_id, visible_to=caller.token)
        response = connector_pb.ListConnectorsResponse()
        for one in self._board.online(request.project_id):
            found = response.connectors.add(name=one.name, member=one.member, address=one.address)
            found.connected_at.FromDatetime(one.connected_at)
            found.destinations.extend(item.message() for item in one.permissions)
        return response

    async def _admitted(
        self, caller: Caller, hello: connector_pb.ConnectorHello, address: str
    ) -> OnlineConnector:
        if self._stopping:
            raise _stopping()
        await self._check(caller, hello.project_id)
        if _NAME.fullmatch(hello.name) is None:
            raise UsageError(
                f'"{plain_line(hello.name, 60)}" cannot be the name of a connector: at most 40 '
                "letters, digits, dots, dashes and underscores between them",
                hint="choose one with --name",
            )
        connector = OnlineConnector(
            hello.project_id, hello.name, caller.token.name, address, _destinations(hello)
        )
        await self._board.add(connector)
        return connector

    async def _check(self, caller: Caller, project_id: str) -> None:
        """Refuse who may not run a connector of a project."""
        caller.token.check_project(project_id)
        await self._members.project(project_id, visible_to=caller.token)
        if caller.token.role == identity_pb.ROLE_UNTRUSTED:
            raise AccessDeniedError(
                "an untrusted member may not run a connector: builds of others would use it"
            )

    async def _watch(self, caller: Caller, connector: OnlineConnector) -> None:
        """End the stream when the login behind it does: revoked, expired, or of less projects."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                now = await self._access.holder(caller.identity)
                await self._check(now, connector.project_id)
            except OffloadError as error:
                self._board.dismiss(connector, error)
                return
            await self._board.follow(connector)

    async def _read(
        self, requests: AsyncIterator[connector_pb.ServeRequest], connector: OnlineConnector
    ) -> None:
        error: OffloadError | None = None
        try:
            async for request in requests:
                if request.WhichOneof("message") != "refused":
                    error = UsageError("a connector says hello once per stream")
                    break
                reason = plain_line(request.refused.reason, _MAX_REASON)
                self._board.refused(connector, request.refused.call_id, reason)
        except (grpc.RpcError, asyncio.InvalidStateError) as broken:
            log.debug("connector.stream.broken", name=connector.name, error=str(broken))
        finally:
            self._board.dismiss(connector, error)

    def _note(self, event: Event, error: OffloadError | None) -> None:
        known = find_offload_error(error) if error is not None else None
        if known is None or isinstance(known, GatewayUnreachableError):
            self._audit.note(event)
            return
        fields = vars(event) | {
            "result": known.reason,
            "detail": f"{event.detail}: {known.message}",
        }
        self._audit.note(Event(**fields))


def _left(event: Event) -> Event:
    return Event(**vars(event) | {"action": "connector.disconnected"})


def _stopping() -> OffloadError:
    return GatewayUnreachableError("the gateway is stopping")


def _shown(hello: connector_pb.ConnectorHello) -> str:
    return " ".join(f"{item.host}:{item.port}" for item in hello.destinations[:MAX_DESTINATIONS])


async def _hello(
    requests: AsyncIterator[connector_pb.ServeRequest],
) -> connector_pb.ConnectorHello:
    first: connector_pb.ServeRequest | None = None
    with suppress(TimeoutError):
        async with asyncio.timeout(HELLO_SECONDS):
            first = await anext(requests, None)
    if first is None or first.WhichOneof("message") != "hello":
        raise UsageError("the first message of a connector must be hello")
    return first.hello


def _destinations(hello: connector_pb.ConnectorHello) -> tuple[Destination, ...]:
    """Return what a connector offers.

    Raises:
        UsageError: something is no host with a port, or there is too much or nothing.
    """
    if not 0 < len(hello.destinations) <= MAX_DESTINATIONS:
        raise UsageError(f"a connector allows between 1 and {MAX_DESTINATIONS} destinations")
    found: dict[Destination, None] = {}
    for item in hello.destinations:
        target = parse_target(plain_line(item.host, 253))
        if not isinstance(target, HostTarget) or target.wildcard or not 0 < item.port < 1 << 16:
            raise UsageError(
                f"{plain_line(item.host, 100)}:{item.port} is no host with a port; builds reach a "
                "connector by names, not by addresses"
            )
        found[target.name, item.port] = None
    return tuple(found)

"""The connectors that are online: what builds can reach through them, and who is asked to connect.

All of it is in memory: connectors come back by themselves when the gateway has restarted.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from offload_builder.egress.policy.evaluate import Evaluator
from offload_builder.egress.policy.model import Attempt
from offload_core.errors import AccessDeniedError, OffloadError, QuotaExceededError
from offload_core.tls import NODE_SUFFIX
from offload_proto.v1 import connector_service_pb2 as connector_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from offload_builder.gateway.egresspolicies import EgressPolicies
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry

log = structlog.get_logger(__name__)

MAX_CONNECTORS = 8
"""Connectors of one project."""
MAX_CALLS = 256
"""Connections that one connector was called for and has neither brought nor refused."""
CALL_SECONDS = 30.0
"""After that nobody waits for an answer to a call."""
_OUTBOX_MESSAGES = 512

Destination = tuple[str, int]
"""Name or address, and port."""


@dataclass(frozen=True, slots=True)
class Permission:
    """What the policy says about a destination of a connector.

    Attributes:
        reason: one sentence where it is not permitted.
    """

    destination: Destination
    permitted: bool
    reason: str = ""

    def message(self) -> connector_pb.ServedDestination:
        """Return it for the wire."""
        return connector_pb.ServedDestination(
            destination=message_of(self.destination), permitted=self.permitted, reason=self.reason
        )


@dataclass(eq=False)
class OnlineConnector:
    """One connector that is online.

    Attributes:
        permissions: one for each of its destinations, in their order.
        outbox: what it is to be told; an error or None ends its stream.
        called: how often it was asked for a connection.
    """

    project_id: str
    name: str
    member: str
    address: str
    destinations: tuple[Destination, ...]
    permissions: tuple[Permission, ...] = ()
    connected_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    outbox: asyncio.Queue[connector_pb.ServeResponse | OffloadError | None] = field(
        default_factory=lambda: asyncio.Queue(_OUTBOX_MESSAGES)
    )
    calls: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By call: the node that waits, and since when, in seconds of the loop."""
    called: int = 0

    def serves(self, destination: Destination) -> bool:
        """Return whether it can be asked for a connection."""
        return any(item.permitted and item.destination == destination for item in self.permissions)

    def post(self, message: connector_pb.ServeResponse) -> bool:
        """Send a message soon; False when it does not read."""
        if self.outbox.full():
            return False
        self.outbox.put_nowait(message)
        return True

    def end(self, error: OffloadError | None = None) -> None:
        """End its stream, whatever it has not read yet."""
        while self.outbox.full():
            self.outbox.get_nowait()
        self.outbox.put_nowait(error)


class ConnectorBoard:
    """Belongs to the event loop.

    Args:
        policies: what builds may reach.
        nodes: who is told what connectors serve.
        endpoints: returns where a node can be dialled.
    """

    def __init__(
        self,
        policies: EgressPolicies,
        nodes: NodeRegistry,
        endpoints: Callable[[AttachedNode], list[str]],
    ) -> None:
        self._policies = policies
        self._nodes = nodes
        self._endpoints = endpoints
        self._online: dict[tuple[str, str], OnlineConnector] = {}
        self._greeting = asyncio.Lock()

    def online(self, project_id: str) -> list[OnlineConnector]:
        """Return the connectors of a project, by name."""
        found = [one for one in self._online.values() if one.project_id == project_id]
        return sorted(found, key=lambda one: one.name)

    async def add(self, connector: OnlineConnector) -> None:
        """Take a connector in; it is told what the policy says, then and after every change.

        Raises:
            AccessDeniedError: its name is that of a connector of somebody else.
            QuotaExceededError: the project has too many.
            OffloadError: the policy cannot be read.
        """
        self._check(connector)
        key = connector.project_id, connector.name
        if (former := self._online.get(key)) is not None:
            former.end(AccessDeniedError(f'"{connector.name}" has connected from elsewhere'))
        # From now on it hears of changes; it serves nothing before it is greeted.
        self._online[key] = connector
        try:
            await self._greet(connector)
        except BaseException:
            self.remove(connector)
            raise
        self._tell_nodes()

    def _check(self, connector: OnlineConnector) -> None:
        others = self.online(connector.project_id)
        same = next((one for one in others if one.name == connector.name), None)
        if same is not None and same.member != connector.member:
            raise AccessDeniedError(
                f'"{same.member}" runs a connector "{same.name}" of the project'
                f' "{same.project_id}" already',
                hint="take another --name",
            )
        if same is None and len(others) >= MAX_CONNECTORS:
            raise QuotaExceededError(
                f'the project "{connector.project_id}" has {MAX_CONNECTORS} connectors already'
            )

    def remove(self, connector: OnlineConnector) -> None:
        """Take a connector out; nodes hear of it at once."""
        for call_id in list(connector.calls):
            self.refused(connector, call_id, f'the connector "{connector.name}" has gone')
        if self._online.get((connector.project_id, connector.name)) is connector:
            del self._online[connector.project_id, connector.name]
            self._tell_nodes()

    def dismiss(self, connector: OnlineConnector, error: OffloadError | None = None) -> None:
        """Take a connector out and end its stream.

        One that does not read what it is sent has an open stream for longer; it serves nothing.
        """
        self.remove(connector)
        connector.end(error)

    async def policies_changed(self) -> None:
        """Have all connectors and nodes follow the policies of now."""
        for connector in list(self._online.values()):
            try:
                await self._greet(connector)
            except OffloadError as error:
                log.error("connector.policy.unreadable", name=connector.name, exc_info=error)
        self._tell_nodes()

    async def follow(self, connector: OnlineConnector) -> None:
        """Have a connector follow rules that have ended; new policies come by themselves."""
        before = connector.permissions
        try:
            await self._greet(connector, only_news=True)
        except OffloadError as error:
            log.error("connector.policy.unreadable", name=connector.name, exc_info=error)
        if connector.permissions != before:
            self._tell_nodes()

    async def _greet(self, connector: OnlineConnector, *, only_news: bool = False) -> None:
        # One after the other, so that what was read last holds.
        async with self._greeting:
            merged, _ = await self._policies.merged(connector.project_id)
            policy = merged.policy
            found = permissions(Evaluator(policy), connector.destinations)
            if only_news and found == connector.permissions:
                return
            connector.permissions = found
            welcome = connector_pb.ConnectorWelcome(
                pool=policy.name,
                contact=policy.contact,
                destinations=[item.message() for item in connector.permissions],
            )
            connector.post(connector_pb.ServeResponse(welcome=welcome))

    async def greet(self, node: AttachedNode) -> None:
        """Tell one node that has just attached."""
        node.post(_message(node, self._served()))

    def _tell_nodes(self) -> None:
        served = self._served()
        for node in self._nodes.connected():
            node.post(_message(node, served))

    def _served(self) -> dict[str, set[Destination]]:
        """Return what builds can reach now, by project."""
        served: dict[str, set[Destination]] = {}
        for one in self._online.values():
            found = served.setdefault(one.project_id, set())
            found.update(item.destination for item in one.permissions if item.permitted)
        return served

    def wish(self, node: AttachedNode, wish: nodes_pb.ConnectionWish) -> None:
        """Ask a connector for a connection that a build at a node wants."""
        destination = wish.destination.host, wish.destination.port
        connector = self._choose(node, wish.project_id, destination)
        if connector is None:
            _refuse(node, wish.call_id, "no connector serves it now")
            return
        call = connector_pb.ConnectorCall(
            call_id=wish.call_id,
            destination=wish.destination,
            endpoints=self._endpoints(node),
            server_name=node.node_id + NODE_SUFFIX,
        )
        now = asyncio.get_running_loop().time()
        connector.calls = {
            key: value for key, value in connector.calls.items() if value[1] > now - CALL_SECONDS
        }
        if len(connector.calls) >= MAX_CALLS or not connector.post(
            connector_pb.ServeResponse(call=call)
        ):
            _refuse(node, wish.call_id, f'the connector "{connector.name}" is too busy')
            return
        connector.calls[wish.call_id] = node.node_id, now
        connector.called += 1

    def _choose(
        self, node: AttachedNode, project_id: str, destination: Destination
    ) -> OnlineConnector | None:
        if not node.token.may_use(project_id):
            return None
        found = [one for one in self.online(project_id) if one.serves(destination)]
        # In turn: one that fails does not get all of them.
        return min(found, key=lambda one: one.called, default=None)

    def refused(self, connector: OnlineConnector, call_id: str, reason: str) -> None:
        """Tell the node that waits that a connector does not bring a connection."""
        node_id, _ = connector.calls.pop(call_id, ("", 0.0))
        node = self._nodes.find(node_id) if node_id else None
        if node is not None:
            _refuse(node, call_id, reason)


def _message(node: AttachedNode, served: Mapping[str, set[Destination]]) -> nodes_pb.AttachResponse:
    """Return what a node hears: of the projects that it builds for, and of no others."""
    message = nodes_pb.ServedDestinations()
    for project_id, destinations in served.items():
        if destinations and node.token.may_use(project_id):
            messages = [message_of(item) for item in sorted(destinations)]
            message.projects.add(project_id=project_id, destinations=messages)
    return nodes_pb.AttachResponse(served_destinations=message)


def permissions(
    evaluator: Evaluator, destinations: Sequence[Destination]
) -> tuple[Permission, ...]:
    """Return what a policy says about destinations of a connector."""
    return tuple(_permission(evaluator, item) for item in destinations)


def message_of(destination: Destination) -> connector_pb.Destination:
    """Return a destination for the wire."""
    return connector_pb.Destination(host=destination[0], port=destination[1])


def _permission(evaluator: Evaluator, destination: Destination) -> Permission:
    host, port = destination
    verdict = evaluator.verdict(Attempt(host, None, port))
    if evaluator.connected(host):
        return Permission(destination, verdict.allowed, "" if verdict.allowed else verdict.reason)
    denied = evaluator.name(host)
    if not denied.allowed and denied.place.line:
        return Permission(destination, False, denied.reason)
    return Permission(destination, False, f'no rule with via = "connector" names {host}')


def _refuse(node: AttachedNode, call_id: str, reason: str) -> None:
    refused = connector_pb.CallRefused(call_id=call_id, reason=reason)
    node.post(nodes_pb.AttachResponse(call_refused=refused))

"""The nodes that are attached to this gateway, and which of them are lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import structlog

from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.pulse import Pulse
from offload_builder.gateway.scheduler import NodeDevice, NodeView, normalise_platform
from offload_core.devices import MAX_NAME
from offload_core.errors import AccessDeniedError, GatewayUnreachableError, NodeLostError
from offload_core.units import format_duration
from offload_proto.v1 import identity_service_pb2 as identity_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.gateway.tokens import TokenRecord
    from offload_core.errors import OffloadError

log = structlog.get_logger(__name__)

MISSED_HEARTBEATS = 3
FORGET_SECONDS = 3600.0
"""How long a lost node is still listed."""

_OUTBOX_MESSAGES = 10_000
_MAX_SHOWN = 300
"""Characters of what a node says of itself, as members see it."""
MAX_PLATFORMS = 100
MAX_DEVICES = 1000
"""Of one node; more are not known."""


class NodeEvents(Protocol):
    """Who wants to know about nodes."""

    def node_lost(self, node_id: str, why: str) -> None:
        """The node's builds are lost."""

    def node_changed(self, node_id: str) -> None:
        """The node can do more, or less, than before."""


@dataclass
class AttachedNode:
    """One node; it stays the same object while the node reconnects."""

    node_id: str
    token: TokenRecord
    hello: nodes_pb.Hello
    platforms: frozenset[str]
    emulated: frozenset[str] = frozenset()
    surveyed: bool = False
    """It has said what its BuildKit can build beside its own platform, and with which devices."""
    devices: frozenset[NodeDevice] = frozenset()
    heartbeat: nodes_pb.Heartbeat = field(default_factory=nodes_pb.Heartbeat)
    connection: Connection | None = None
    last_seen_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    last_seen: float = 0.0
    """Loop time of the last message."""
    lost: bool = False
    last_owned: str = ""
    """Ended build that still sends its log, so that not each message asks the history."""
    offers: dict[str, asyncio.Future[nodes_pb.OfferReply]] = field(default_factory=dict)
    tasks: dict[str, asyncio.Future[nodes_pb.CacheTaskReply]] = field(default_factory=dict)
    """Questions about the layer cache that are open, by task."""
    session_tasks: dict[str, asyncio.Future[nodes_pb.SessionTaskReply]] = field(
        default_factory=dict
    )
    """Work on sessions that is asked for, by task."""

    def post(self, message: nodes_pb.AttachResponse) -> bool:
        """Send a message soon; False when the node is not connected."""
        return self.connection is not None and self.connection.post(message)

    def cancel_build(self, build_id: str, reason: str) -> bool:
        """Tell the node to end a build or give back its slot; False when it is not connected."""
        message = nodes_pb.CancelBuild(build_id=build_id, reason=reason)
        return self.post(nodes_pb.AttachResponse(cancel_build=message))

    def drop_offers(self) -> None:
        """Give up on answers that can no longer come."""
        offers, self.offers = self.offers, {}
        for future in offers.values():
            if not future.done():
                future.set_result(nodes_pb.OfferReply(reason="the connection to the node broke"))
        broke = NodeLostError(f"the connection to node {self.node_id} broke; try again")
        for task in self.tasks.values():
            if not task.done():
                task.set_exception(broke)
        for work in self.session_tasks.values():
            if not work.done():
                work.set_exception(broke)

    def take_reply(self, reply: nodes_pb.CacheTaskReply) -> None:
        """Hand an answer to the one who waits for it; one that comes too late is dropped."""
        future = self.tasks.get(reply.task_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def take_session_reply(self, reply: nodes_pb.SessionTaskReply) -> None:
        """Do as `take_reply` for work on a session."""
        future = self.session_tasks.get(reply.task_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def take_platforms(self, found: nodes_pb.NodePlatforms) -> bool:
        """Note what it builds; return whether that is news."""
        before = self.platforms, self.emulated, self.surveyed
        self.platforms = frozenset(normalise_platform(item) for item in found.native)
        emulated = frozenset(normalise_platform(item) for item in found.emulated)
        self.emulated, self.surveyed = emulated - self.platforms, True
        return before != (self.platforms, self.emulated, self.surveyed)

    def take_devices(self, found: nodes_pb.NodeDevices) -> bool:
        """Note what it has; return whether that is news."""
        before = self.devices
        self.devices = frozenset(
            NodeDevice(plain_line(item.name, MAX_NAME), plain_line(item.alias, MAX_NAME))
            for item in found.devices[:MAX_DEVICES]
        )
        return before != self.devices

    def view(self, load: int = 0) -> NodeView:
        """Return what the scheduler needs to know.

        Args:
            load: slots that this gateway knows to be taken; the node may have others.
        """
        return NodeView(
            node_id=self.node_id,
            slots=self.hello.slots,
            load=max(load, self.heartbeat.running),
            platforms=self.platforms,
            emulated=self.emulated,
            draining=self.heartbeat.draining,
            project_ids=frozenset(self.token.project_ids),
            firewall=self.hello.firewall,
            devices=self.devices,
        )


class Connection:
    """One open Attach stream: what still has to be sent, and why it ends."""

    def __init__(self) -> None:
        self._messages: list[nodes_pb.AttachResponse] = []
        self._changed = Pulse()
        self._closed = False
        self._error: OffloadError | None = None

    def post(self, message: nodes_pb.AttachResponse) -> bool:
        """Send a message soon; False when the stream is at its end."""
        if self._closed:
            return False
        if len(self._messages) >= _OUTBOX_MESSAGES:
            self.close(GatewayUnreachableError("the node does not read its messages"))
            return False
        self._messages.append(message)
        self._changed.fire()
        return True

    def close(self, error: OffloadError | None = None) -> None:
        """End the stream, with an error or without; the first call wins."""
        if not self._closed:
            self._closed, self._error = True, error
            self._changed.fire()

    async def take(self) -> list[nodes_pb.AttachResponse]:
        """Return the next messages; an empty list at the end.

        Raises:
            OffloadError: the stream was closed with an error.
        """
        while not self._messages and not self._closed:
            await self._changed.wait()
        messages, self._messages = self._messages, []
        if not messages and self._error is not None:
            raise self._error
        return messages


class NodeRegistry:
    """All nodes of this gateway. Belongs to the event loop."""

    def __init__(self, heartbeat_interval: float, reconnect_grace: float) -> None:
        """Set the seconds between heartbeats and for which a broken stream is forgiven."""
        self.heartbeat_interval = heartbeat_interval
        self._reconnect_grace = reconnect_grace
        self._nodes: dict[str, AttachedNode] = {}
        self._events: list[NodeEvents] = []
        self._closed = False

    def listen(self, events: NodeEvents) -> None:
        """Add who is told about changes."""
        self._events.append(events)

    def attach(self, node_id: str, token: TokenRecord, hello: nodes_pb.Hello) -> AttachedNode:
        """Take a node in, or back.

        Raises:
            AccessDeniedError: the name is in use by a node of another token.
            GatewayUnreachableError: the gateway is stopping.
        """
        if self._closed:
            raise _stopping()
        self.check_name(node_id, token)
        now = asyncio.get_running_loop().time()
        node = self._nodes.get(node_id)
        platforms = frozenset(normalise_platform(item) for item in hello.platforms)
        if node is None:
            node = self._nodes[node_id] = AttachedNode(node_id, token, hello, platforms)
        elif node.connection is not None:
            # The old stream is half dead: the node would not dial again otherwise.
            node.drop_offers()
            node.connection.close(NodeLostError("the node has attached again"))
        node.token, node.hello, node.platforms = token, hello, platforms
        # Its devices stay what they were until it says what they are now.
        node.emulated, node.surveyed = frozenset(), False
        node.heartbeat = nodes_pb.Heartbeat(
            running=len(hello.running_build_ids), sessions=len(hello.sessions)
        )
        node.connection = Connection()
        node.lost = False
        node.last_seen, node.last_seen_at = now, datetime.now(UTC)
        log.info("node.attached", node_id=node_id, slots=hello.slots, version=hello.version)
        return node

    def check_name(self, node_id: str, token: TokenRecord) -> None:
        """Refuse a name that belongs to somebody else now.

        Raises:
            AccessDeniedError: it is in use by a node of another token.
        """
        node = self.find(node_id)
        if node is not None and node.token.family != token.family:
            raise AccessDeniedError(
                f'the name "{node_id}" is in use by a node that was enrolled with another token; '
                "give this node another name"
            )

    def detach(self, node: AttachedNode, connection: Connection) -> None:
        """Note that a stream has ended; the node has some time to come back."""
        connection.close()
        if node.connection is not connection:
            return
        node.connection = None
        node.drop_offers()
        if not node.lost and not self._closed:
            log.warning("node.detached", node_id=node.node_id, grace_seconds=self._reconnect_grace)
            self._tell_changed(node)

    def heard(self, node: AttachedNode, heartbeat: nodes_pb.Heartbeat | None = None) -> None:
        """Note a sign of life."""
        node.last_seen = asyncio.get_running_loop().time()
        node.last_seen_at = datetime.now(UTC)
        if heartbeat is not None:
            changed = _places(heartbeat) != _places(node.heartbeat)
            node.heartbeat = heartbeat
            if heartbeat.HasField("devices") and node.take_devices(heartbeat.devices):
                changed = True
            if heartbeat.HasField("platforms") and node.take_platforms(heartbeat.platforms):
                changed = True
            if changed:
                self._tell_changed(node)

    def find(self, node_id: str) -> AttachedNode | None:
        """Return a node that is attached or may come back, or None."""
        node = self._nodes.get(node_id)
        return None if node is None or node.lost else node

    def connected(self) -> list[AttachedNode]:
        """Return the nodes that can be asked now."""
        return [node for node in self._nodes.values() if node.connection is not None]

    def away(self) -> list[AttachedNode]:
        """Return the nodes that cannot be asked now, but may come back."""
        nodes = self._nodes.values()
        return [node for node in nodes if node.connection is None and not node.lost]

    def known(self) -> list[AttachedNode]:
        """Return all nodes, those that were lost within the last hour as well."""
        return list(self._nodes.values())

    def disconnect_token(self, token_id: str, error: OffloadError) -> None:
        """End the streams of all nodes of a token."""
        for node in self.connected():
            if token_id in (node.token.token_id, node.token.family) and node.connection is not None:
                node.connection.close(error)

    def infos(self) -> list[identity_pb.NodeInfo]:
        """Return the pool as the API shows it, by name."""
        return [self._info(node) for _, node in sorted(self._nodes.items())]

    def _info(self, node: AttachedNode) -> identity_pb.NodeInfo:
        state = "draining" if node.heartbeat.draining else "ready"
        health = plain_line(node.heartbeat.health, _MAX_SHOWN)
        if node.connection is None:
            state = "lost"
            age = format_duration(asyncio.get_running_loop().time() - node.last_seen)
            health = f"not heard of for {age}" + ("" if node.lost else "; it may come back")
        info = identity_pb.NodeInfo(
            node_id=node.node_id,
            state=state,
            running=0 if node.lost else node.heartbeat.running,
            slots=node.hello.slots,
            platforms=_shown(node.heartbeat.platforms.native or node.hello.platforms),
            emulated_platforms=_shown(node.heartbeat.platforms.emulated),
            devices=sorted(device.name for device in node.devices),
            version=plain_line(node.hello.version, _MAX_SHOWN),
            buildkit_version=plain_line(node.hello.buildkit_version, _MAX_SHOWN),
            disk_free_bytes=node.heartbeat.disk_free_bytes,
            health=health,
        )
        info.last_seen_at.FromDatetime(node.last_seen_at)
        return info

    async def watch(self) -> None:
        """Find lost nodes until cancelled."""
        loop = asyncio.get_running_loop()
        step = self.heartbeat_interval / 2
        while True:
            due = loop.time() + step
            await asyncio.sleep(step)
            if loop.time() - due > self.heartbeat_interval:
                # We were held up ourselves: heartbeats wait unread in the sockets.
                log.warning("gateway.delayed", seconds=loop.time() - due)
                continue
            for node in list(self._nodes.values()):
                self._check(node, loop.time() - node.last_seen)

    def _check(self, node: AttachedNode, silence: float) -> None:
        if node.lost:
            if silence > FORGET_SECONDS:
                del self._nodes[node.node_id]
        elif node.connection is not None:
            if silence > MISSED_HEARTBEATS * self.heartbeat_interval:
                self._lose(node, f"it sent no heartbeat for {format_duration(silence)}")
        elif silence > self._reconnect_grace:
            self._lose(node, f"its connection broke {format_duration(silence)} ago")

    def _lose(self, node: AttachedNode, why: str) -> None:
        node.lost = True
        node.drop_offers()
        if node.connection is not None:
            node.connection.close(NodeLostError(f"the gateway gave this node up: {why}"))
            node.connection = None
        log.error("node.lost", node_id=node.node_id, why=why)
        for events in self._events:
            events.node_lost(node.node_id, why)

    def _tell_changed(self, node: AttachedNode) -> None:
        for events in self._events:
            events.node_changed(node.node_id)

    def close(self) -> None:
        """End all streams; nodes keep their builds and come back to the next gateway."""
        self._closed = True
        for node in self.connected():
            if node.connection is not None:
                node.connection.close(_stopping())


def _places(heartbeat: nodes_pb.Heartbeat) -> tuple[object, ...]:
    """Return what says whether a node can take a build or a session more."""
    return (
        heartbeat.running,
        heartbeat.draining,
        heartbeat.sessions,
        heartbeat.sessions_problem,
        sorted(heartbeat.devices_in_sessions),
    )


def _shown(platforms: Iterable[str]) -> list[str]:
    return [plain_line(item, _MAX_SHOWN) for item in islice(platforms, MAX_PLATFORMS)]


def _stopping() -> GatewayUnreachableError:
    return GatewayUnreachableError("this gateway is stopping; try again in a moment")

"""Admission: builds enter the queue, wait for their turn and are handed to a node.

Nodes own their slots: the gateway offers a build, the node accepts or declines.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from offload_builder.gateway.cachetrust import MAX_NAME
from offload_builder.gateway.devices import PoolDevices, check_devices
from offload_builder.gateway.history import BuildRecord
from offload_builder.gateway.offers import Offers
from offload_builder.gateway.plaintext import plain_line
from offload_builder.gateway.platforms import PoolPlatforms
from offload_builder.gateway.scheduler import (
    QueuedBuild,
    fair_order,
    normalise_platform,
    plan,
    waiting_reason,
)
from offload_builder.gateway.tokens import random_id
from offload_core.devices import MAX_NAME as MAX_DEVICE_NAME
from offload_core.errors import (
    AccessDeniedError,
    BuildCanceledError,
    GatewayUnreachableError,
    InternalError,
    QueueTimeoutError,
    QuotaExceededError,
    UsageError,
)
from offload_core.units import format_duration
from offload_proto.v1 import builds_service_pb2 as builds_pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

    from offload_builder.gateway.active_builds import ActiveBuild, ActiveBuilds
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.scheduler import NodeView
    from offload_builder.gateway.tokens import TokenRecord
    from offload_core.errors import OffloadError

log = structlog.get_logger(__name__)

ARRIVAL_GRACE_SECONDS = 5.0
"""How much longer than the slot is held the gateway waits for news of the client's arrival."""

CANCEL_GRACE_SECONDS = 10.0
"""How long a node may take to end a build."""

QUEUE_HINT = "try again later, or ask the administrator for more nodes"
MAX_PLATFORMS = 33
"""32 that are wanted, and that of the client."""
_LONG_QUEUE = 100
_LONG_QUEUE_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Waiting:
    """The build has a place in the queue."""

    position: int
    reason: str


@dataclass(frozen=True)
class Placed:
    """A node has accepted the build."""

    node: AttachedNode


class Admission:
    """The queue. Belongs to the event loop; `run` must run for anything to move."""

    def __init__(self, config: GatewayConfig, builds: ActiveBuilds, nodes: NodeRegistry) -> None:
        self._config = config
        self._builds = builds
        self._nodes = nodes
        self._wake = asyncio.Event()
        self._served: dict[str, int] = {}
        self._turns = 0
        self._stopping = False
        self._offers = Offers(config, builds, self.wake, self._accepted)
        self.session_places: Callable[[], Mapping[tuple[str, str], str]] = dict
        """Returns nodes with sessions by project and member; set once sessions are known."""
        self.platforms = PoolPlatforms(nodes, config.restart_grace)
        self._devices = PoolDevices(nodes, self.platforms)

    def wake(self) -> None:
        """Look at the queue again soon."""
        self._wake.set()

    async def submit(
        self,
        request: builds_pb.CreateRequest,
        token: TokenRecord,
        lost: BuildRecord | None = None,
        *,
        node_id: str = "",
    ) -> ActiveBuild:
        """Put a build into the queue, or find the one that the same request has made before.

        Args:
            request: the build.
            token: of who asks.
            lost: the build of the same member and project that this one repeats.
            node_id: the node to which the client is connected already; empty for any node.

        Raises:
            UsageError: the request cannot be understood, or its build has ended.
            QuotaExceededError: the queue is full.
            NotFoundError: no node of the pool can do what it wants.
            GatewayUnreachableError: the gateway is stopping.
        """
        self.check_open()
        _check_request(request)
        known = self._builds.find_request(token.token_id, request.request_id)
        if known is not None:
            known.only_node = known.only_node or node_id
            return _same(known, request)
        waiting = sum(build.queued for build in self._builds.all())
        if waiting >= self._config.max_queued_builds:
            raise QuotaExceededError(
                f"the queue is full: {waiting} builds wait; try again when some have run"
            )
        record = BuildRecord(
            build_id=random_id(),
            request_id=request.request_id,
            project_id=request.project_id,
            member=token.name,
            token_id=token.token_id,
            role=token.role,
            name=plain_line(request.name, 500),
            state=builds_pb.BUILD_STATE_QUEUED,
            created_at=datetime.now(UTC),
            dockerfile_path=plain_line(request.dockerfile_path, 4096),
            target=plain_line(request.target, 500),
            platforms=tuple(plain_line(item, 64) for item in request.platforms),
            vcs_branch=request.vcs_branch[:MAX_NAME],
            vcs_revision=plain_line(request.vcs_revision, 200),
            vcs_target_branch=request.vcs_target_branch[:MAX_NAME],
            cache_choice=request.cache.SerializeToString(),
            group_id=request.group_id,
            preferred_platform="" if request.platforms else request.preferred_platform,
            repeat_of=lost.build_id if lost is not None else "",
            identity=token.identity,
            client=plain_line(request.client, 40),
            network_policy=(
                request.network_policy.SerializeToString()
                if request.HasField("network_policy")
                else b""
            ),
            devices=tuple(plain_line(item, MAX_DEVICE_NAME) for item in request.devices),
        )
        if record.network_policy and (refusal := self.platforms.no_firewall(record.project_id)):
            raise refusal
        if problem := (
            self.platforms.refusal(record.project_id, record.platforms)
            or self._devices.refusal(record.project_id, record.devices, record.platforms, node_id)
        ):
            raise problem
        # In memory first: the same request may come a second time while this one is written.
        build = self._builds.add(record)
        build.last_choice = lost.node_id if lost is not None else ""
        build.only_node = node_id
        try:
            written = await self._builds.history.insert(record)
        except BaseException:
            self._builds.forget(build, InternalError("the build could not be written down"))
            raise
        if not written:
            error = await self._already_made(token, request.request_id)
            self._builds.forget(build, error)
            raise error
        build.written = True
        if lost is not None:
            self._builds.history.change(lost.build_id, repeated_by=record.build_id)
        self._start_queue_timer(build, self._config.queue_timeout)
        log.info(
            "build.admitted",
            build_id=build.build_id,
            project_id=record.project_id,
            member=record.member,
            repeat_of=record.repeat_of,
        )
        return build

    async def _already_made(self, token: TokenRecord, request_id: str) -> UsageError:
        record = await self._builds.history.find_request(token.token_id, request_id)
        which = f"build {record.build_id}" if record is not None else "another build"
        return UsageError(
            f"this request has already made {which}, which has ended; use a new request_id"
        )

    def readmit(self, build: ActiveBuild) -> None:
        """Let a build that was queued before a restart wait for its client, in its old place."""
        build.written = True
        age = (datetime.now(UTC) - build.record.created_at).total_seconds()
        self._start_queue_timer(build, max(1.0, self._config.queue_timeout - age))
        build.start_grace(self._config.restart_grace, self._restart_is_over)

    def _start_queue_timer(self, build: ActiveBuild, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        build.queue_timer = loop.call_later(seconds, self._waited_too_long, build)

    async def updates(self, build: ActiveBuild) -> AsyncGenerator[Waiting | Placed]:
        """Report the build's place in the queue until a node has it.

        While nobody listens the build is not offered; some time later it leaves the queue.

        Raises:
            OffloadError: it left the queue in another way.
        """
        async with self._watched(build):
            last: Waiting | None = None
            while True:
                if build.outcome is not None:
                    raise build.outcome
                if build.ended:
                    raise UsageError(f"build {build.build_id} has ended; use a new request_id")
                if build.running:
                    yield self._placed(build)
                    return
                self.check_open()
                view = Waiting(build.position, build.reason)
                if build.position and build.reason and not build.asked_node and view != last:
                    last = view
                    yield view
                    # The state may have changed while the message was sent.
                    continue
                await build.changed.wait()

    def _placed(self, build: ActiveBuild) -> Placed:
        node = self._nodes.find(build.node_id)
        if node is None:
            raise GatewayUnreachableError(
                f"build {build.build_id} is at node {build.node_id}, which is away for the moment; "
                "try again"
            )
        return Placed(node)

    @asynccontextmanager
    async def _watched(self, build: ActiveBuild) -> AsyncIterator[None]:
        build.watchers += 1
        if build.queued:
            build.stop_grace()
            self.wake()
        try:
            yield
        finally:
            build.watchers -= 1
            if build.queued and not build.watchers and not self._stopping:
                build.position = 0
                build.start_grace(self._config.client_grace, self._client_is_gone)
                self.wake()

    def place_beside(self, build: ActiveBuild, other_id: str) -> None:
        """Give a build a place beside a running one of the same client, without a slot of its own.

        It waits as any other does when there is no such build any more.
        """
        other = self._builds.find(other_id)
        if other is None or not other.running or not build.queued or build.asked_node:
            return
        mine, its = build.record, other.record
        same = (mine.token_id, mine.project_id) == (its.token_id, its.project_id)
        if same and build.only_node == other.node_id:
            self._builds.run(build, other.node_id)
            wait = self._config.slot_hold + ARRIVAL_GRACE_SECONDS
            build.start_grace(wait, self._client_did_not_arrive)

    def cancel(self, build: ActiveBuild, *, by: str) -> float:
        """End a build; return how many seconds its node may take."""
        reason = f"cancelled by {by}"
        if build.queued:
            self._builds.end(
                build,
                builds_pb.BUILD_STATE_CANCELED,
                error=reason,
                outcome=BuildCanceledError(f"build {build.build_id} was {reason}"),
            )
            return 0.0
        self._cancel_running(build, reason)
        return CANCEL_GRACE_SECONDS

    def _cancel_running(self, build: ActiveBuild, reason: str) -> None:
        build.cancel_reason = reason
        node = self._nodes.find(build.node_id)
        if node is not None:
            # A node that is away is told when it is back.
            node.cancel_build(build.build_id, reason)

    def builds(self) -> list[ActiveBuild]:
        """Return the builds that wait or run."""
        return self._builds.all()

    def cancel_token(self, token_id: str, *, why: str) -> None:
        """End the builds of a token, also those that run; harmless when they end already."""
        for build in self._builds.all():
            if build.record.token_id != token_id:
                continue
            if build.running and not build.cancel_reason:
                self._cancel_running(build, why)
            elif build.queued:
                self._builds.end(
                    build,
                    builds_pb.BUILD_STATE_CANCELED,
                    error=why,
                    outcome=BuildCanceledError(f"build {build.build_id} was cancelled: {why}"),
                )

    def give_back(self, build: ActiveBuild, *, why: str) -> None:
        """End a build whose client will not go to the node that has accepted it."""
        if build.running and not build.arrived:
            node = self._nodes.find(build.node_id)
            if node is not None:
                node.cancel_build(build.build_id, why)
            self._builds.end(build, builds_pb.BUILD_STATE_CANCELED, error=why)

    def check_open(self) -> None:
        """Refuse work while the gateway stops.

        Raises:
            GatewayUnreachableError: it does.
        """
        if self._stopping:
            raise GatewayUnreachableError(
                "this gateway is stopping; try again in a moment, builds keep their place"
            )

    async def run(self) -> None:
        """Hand out builds until cancelled."""
        self.platforms.begin(self.wake)
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                length = self._dispatch()
                if length > _LONG_QUEUE:
                    # One look costs time in proportion to the queue; take many changes together.
                    await asyncio.sleep(_LONG_QUEUE_PAUSE_SECONDS)
        finally:
            await self._offers.close()

    def stop(self) -> None:
        """Hand out nothing more and end all waiting."""
        self._stopping = True
        for build in self._builds.all():
            build.changed.fire()

    def _dispatch(self) -> int:
        """Ask nodes, then tell everyone in the queue the new places; return its length."""
        if self._stopping:
            return 0
        waiting = {
            build.build_id: build
            for build in self._builds.all()
            if build.queued and build.watchers > 0 and build.written
        }
        waiting = {key: build for key, build in waiting.items() if not self._refuse(build)}
        places = self.session_places()
        order = fair_order([_snapshot(build, places) for build in waiting.values()], self._served)
        asked = {build_id for build_id, build in waiting.items() if build.asked_node}
        open_builds = [item for item in order if item.build_id not in asked]
        for build_id, node_id in plan(open_builds, self._views()).items():
            node = self._nodes.find(node_id)
            if node is not None:
                self._turns += 1
                build = waiting[build_id]
                self._served[build.record.project_id] = self._turns
                self._offers.make(build, node)
        views = self._views()
        for position, item in enumerate(order, start=1):
            build = waiting[item.build_id]
            # While a node is being asked there is nothing to tell: the answer takes milliseconds.
            reason = "" if build.asked_node else self._why_waiting(build, item, views)
            if (build.position, build.reason) != (position, reason):
                build.position, build.reason = position, reason
                build.changed.fire()
        return len(order)

    def _refuse(self, build: ActiveBuild) -> bool:
        """End a build that waits for a node which will not come."""
        if build.asked_node:
            return False
        record = build.record
        problem: OffloadError | None = None
        if record.network_policy:
            problem = self.platforms.no_firewall(record.project_id)
        if problem is None and self.platforms.is_far(record.project_id, build.platforms):
            problem = self.platforms.refusal(record.project_id, record.platforms)
        far = build.only_node or self._devices.is_far(
            record.project_id, record.devices, build.platforms
        )
        if problem is None and far:
            problem = self._devices.refusal(
                record.project_id, record.devices, record.platforms, build.only_node
            )
        if problem is None:
            return False
        self._builds.end(
            build, builds_pb.BUILD_STATE_FAILED, error=problem.message, outcome=problem
        )
        return True

    def plan_platforms(self, project_id: str, platforms: Sequence[str]) -> list[tuple[str, ...]]:
        """Return which platforms of a build one node can build together.

        Raises:
            UsageError: they are too many or too long.
            PlatformUnavailableError: no node of the pool builds one of them.
        """
        _check_platforms(platforms)
        return self.platforms.groups(project_id, platforms)

    def _views(self) -> list[NodeView]:
        return [node.view(self._builds.load(node.node_id)) for node in self._nodes.connected()]

    def _why_waiting(self, build: ActiveBuild, item: QueuedBuild, views: list[NodeView]) -> str:
        away = self.platforms.awaited(item, views) or self._devices.awaited(item, views)
        return away or _reason(build, waiting_reason(item, views))

    def node_changed(self, node_id: str) -> None:
        """A node has changed: ask it again."""
        for build in self._builds.all():
            build.declined.pop(node_id, None)
        self.wake()

    def _accepted(self, build: ActiveBuild, node: AttachedNode) -> bool:
        """Take a node's acceptance; False when the build is not wanted any more."""
        if not build.queued or not build.watchers or self._stopping:
            return False
        self._builds.run(build, node.node_id)
        wait = self._config.slot_hold + ARRIVAL_GRACE_SECONDS
        build.start_grace(wait, self._client_did_not_arrive)
        return True

    def _waited_too_long(self, build: ActiveBuild) -> None:
        limit = format_duration(self._config.queue_timeout)
        text = f"no node became free within {limit}"
        if build.reason:
            text += f": {build.reason}"
        self._builds.end(
            build,
            builds_pb.BUILD_STATE_FAILED,
            error=text,
            outcome=QueueTimeoutError(text, hint=QUEUE_HINT),
        )

    def _client_is_gone(self, build: ActiveBuild) -> None:
        text = "its client left the queue"
        self._builds.end(
            build,
            builds_pb.BUILD_STATE_CANCELED,
            error=text,
            outcome=BuildCanceledError(f"build {build.build_id} was cancelled: {text}"),
        )

    def _restart_is_over(self, build: ActiveBuild) -> None:
        text = "the gateway restarted while the build waited, and its client did not come back"
        self._builds.end(build, builds_pb.BUILD_STATE_LOST, error=text)

    def _client_did_not_arrive(self, build: ActiveBuild) -> None:
        hold = format_duration(self._config.slot_hold)
        self.give_back(
            build, why=f"its client did not arrive at node {build.node_id} within {hold}"
        )


def _snapshot(build: ActiveBuild, places: Mapping[tuple[str, str], str]) -> QueuedBuild:
    return QueuedBuild(
        build_id=build.build_id,
        project_id=build.record.project_id,
        arrival=build.arrival,
        platforms=build.platforms,
        preferred=normalise_platform(build.record.preferred_platform),
        declined_by=frozenset(build.declined),
        last_choice=build.last_choice,
        session_node=places.get((build.record.project_id, build.record.member), ""),
        only_node=build.only_node,
        behind_firewall=bool(build.record.network_policy),
        devices=build.record.devices,
    )


def _reason(build: ActiveBuild, reason: str) -> str:
    if build.declined and reason.startswith("the free nodes declined"):
        node_id, why = next(iter(build.declined.items()))
        return f"node {node_id} declined: {why}"
    return reason


def _check_request(request: builds_pb.CreateRequest) -> None:
    if not 1 <= len(request.request_id) <= 128:
        raise UsageError("a build request needs a request_id of at most 128 characters")
    _check_platforms((*request.platforms, request.preferred_platform))
    check_devices(request.devices)
    if len(request.group_id) > 64:
        raise UsageError("a build request has a group_id of at most 64 characters")


def _check_platforms(platforms: Sequence[str]) -> None:
    if len(platforms) > MAX_PLATFORMS or any(len(item) > 64 for item in platforms):
        raise UsageError("a build request names at most 32 platforms of at most 64 characters")


def _same(build: ActiveBuild, request: builds_pb.CreateRequest) -> ActiveBuild:
    if build.record.project_id != request.project_id:
        raise AccessDeniedError(
            f"this request_id already belongs to a build of the project {build.record.project_id}"
        )
    return build

"""Builds that wait or run, in memory, and every change of their state.

All of it belongs to the event loop. Changes are written to the history in their order.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.history import FINAL_STATES, BuildRecord, History, without_text
from offload_builder.gateway.pulse import Pulse
from offload_builder.gateway.scheduler import normalise_platform
from offload_proto.v1 import builds_service_pb2 as builds_pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_core.errors import OffloadError

log = structlog.get_logger(__name__)


@dataclass
class ActiveBuild:
    """One build that waits or runs."""

    record: BuildRecord
    """As it was when it was admitted; state and node are the fields below."""
    state: builds_pb.BuildState.ValueType
    arrival: int
    node_id: str = ""
    only_node: str = ""
    """Node to which its client is connected; empty for any."""
    asked_node: str = ""
    """Node that holds an offer and has not answered."""
    position: int = 0
    """1 is the next to run; 0 as long as it has no place in the queue."""
    reason: str = ""
    written: bool = False
    """The history has it; before that it is not offered."""
    arrived: bool = False
    """The client has reached the node."""
    assigned_at: float = 0.0
    """Loop time; 0 while it waits."""
    cancel_reason: str = ""
    """Set once somebody wants a running build to end."""
    watchers: int = 0
    outcome: OffloadError | None = None
    """Why it left the queue other than to a node."""
    declined: dict[str, str] = field(default_factory=dict)
    """Reasons by node, as long as the node is not asked again."""
    changed: Pulse = field(default_factory=Pulse)
    platforms: tuple[str, ...] = ()
    last_choice: str = ""
    """Node with which an earlier run of it was lost."""
    queue_timer: asyncio.TimerHandle | None = None
    grace_timer: asyncio.TimerHandle | None = None

    @property
    def build_id(self) -> str:
        """Identifier."""
        return self.record.build_id

    @property
    def queued(self) -> bool:
        """Whether it waits."""
        return self.state == builds_pb.BUILD_STATE_QUEUED

    @property
    def running(self) -> bool:
        """Whether it is at a node."""
        return self.state == builds_pb.BUILD_STATE_RUNNING

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state in FINAL_STATES

    def start_grace(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` after a time, unless something happens before; there is one at a time."""
        self.stop_grace()
        loop = asyncio.get_running_loop()
        self.grace_timer = loop.call_later(seconds, action, self, *arguments)

    def stop_grace(self) -> None:
        """Take back `start_grace`."""
        if self.grace_timer is not None:
            self.grace_timer.cancel()
            self.grace_timer = None

    def stop_timers(self) -> None:
        """Take back all that would happen later."""
        self.stop_grace()
        if self.queue_timer is not None:
            self.queue_timer.cancel()
            self.queue_timer = None


class ActiveBuilds:
    """The builds that have not ended, by id."""

    def __init__(self, history: History, on_end: Callable[[str], None]) -> None:
        """Report to a history; `on_end` hears the ids of builds that are over."""
        self.history = history
        self._on_end = on_end
        self._on_change: Callable[[], None] = _nothing
        self._builds: dict[str, ActiveBuild] = {}
        self._by_request: dict[tuple[str, str], ActiveBuild] = {}
        self._loads: Counter[str] = Counter()
        self._arrivals = 0

    def listen(self, on_change: Callable[[], None]) -> None:
        """Set what is called when slots or places in the queue have changed."""
        self._on_change = on_change

    def add(self, record: BuildRecord) -> ActiveBuild:
        """Take a build in, in the state of its record."""
        self._arrivals += 1
        build = ActiveBuild(
            record=record,
            state=record.state,
            arrival=self._arrivals,
            node_id=record.node_id,
            platforms=tuple(dict.fromkeys(normalise_platform(item) for item in record.platforms)),
        )
        self._builds[record.build_id] = build
        self._by_request[record.token_id, record.request_id] = build
        if build.running:
            self._loads[build.node_id] += 1
        return build

    def forget(self, build: ActiveBuild, outcome: OffloadError) -> None:
        """Take out a build that never came to be, and tell those who wait for it why."""
        build.stop_timers()
        build.outcome = outcome
        self._remove(build)
        build.changed.fire()

    def find(self, build_id: str) -> ActiveBuild | None:
        """Return a build that has not ended, or None."""
        return self._builds.get(build_id)

    def find_request(self, token_id: str, request_id: str) -> ActiveBuild | None:
        """Return the build that a request has made and that has not ended, or None."""
        return self._by_request.get((token_id, request_id))

    def all(self) -> list[ActiveBuild]:
        """Return all, oldest first."""
        return list(self._builds.values())

    def at_node(self, node_id: str) -> list[ActiveBuild]:
        """Return the builds that run at a node."""
        return [build for build in self._builds.values() if build.node_id == node_id]

    def load(self, node_id: str) -> int:
        """Return how many slots of a node are taken or asked for."""
        return self._loads[node_id]

    def waiting_for(self) -> Counter[str]:
        """Return how many builds wait for one node only and are not offered to it, by node."""
        return Counter(
            build.only_node
            for build in self._builds.values()
            if build.queued and build.only_node and not build.asked_node
        )

    def ask(self, build: ActiveBuild, node_id: str) -> None:
        """Note that a node is being asked."""
        build.asked_node = node_id
        self._loads[node_id] += 1

    def unask(self, build: ActiveBuild) -> None:
        """Note that the node did not take it."""
        self._loads[build.asked_node] -= 1
        build.asked_node = ""
        self._on_change()

    def run(self, build: ActiveBuild, node_id: str) -> None:
        """Note that a node has it."""
        build.stop_timers()
        if build.asked_node:
            self._loads[build.asked_node] -= 1
            build.asked_node = ""
        self._loads[node_id] += 1
        build.node_id = node_id
        build.state = builds_pb.BUILD_STATE_RUNNING
        build.position = 0
        build.declined.clear()
        build.assigned_at = asyncio.get_running_loop().time()
        self.history.change(
            build.build_id,
            state=build.state,
            node_id=node_id,
            started_at=datetime.now(UTC),
            completed_at=None,
            error="",
        )
        log.info("build.assigned", build_id=build.build_id, node_id=node_id)
        build.changed.fire()
        self._on_change()

    def end(
        self,
        build: ActiveBuild,
        state: builds_pb.BuildState.ValueType,
        *,
        error: str = "",
        outcome: OffloadError | None = None,
        **values: Any,
    ) -> None:
        """Note that it is over; harmless when it already was.

        Args:
            build: the build.
            state: a final one.
            error: one sentence for the history.
            outcome: what those who wait for a place are told.
            values: further columns of the history.
        """
        if build.ended:
            return
        build.stop_timers()
        node_id = build.node_id if build.running else build.asked_node
        if node_id:
            self._loads[node_id] -= 1
        build.asked_node = ""
        build.state = state
        build.outcome = outcome
        build.position = 0
        self._remove(build)
        if build.record.network_policy:
            values["network_policy"] = without_text(build.record.network_policy)
        self.history.change(
            build.build_id, state=state, completed_at=datetime.now(UTC), error=error, **values
        )
        log.info(
            "build.ended",
            build_id=build.build_id,
            state=builds_pb.BuildState.Name(state).removeprefix("BUILD_STATE_").lower(),
            node_id=build.node_id,
            error=error,
        )
        build.changed.fire()
        self._on_end(build.build_id)
        self._on_change()

    def _remove(self, build: ActiveBuild) -> None:
        self._builds.pop(build.build_id, None)
        key = (build.record.token_id, build.record.request_id)
        if self._by_request.get(key) is build:
            del self._by_request[key]

    def close(self) -> None:
        """Stop all timers; the states stay as they are in the history."""
        for build in self._builds.values():
            build.stop_timers()
            build.changed.fire()


def _nothing() -> None:
    """Stand in for a listener that is not there yet."""

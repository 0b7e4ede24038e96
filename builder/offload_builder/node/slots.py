"""The builds at a node and the slots that they take, or that wait for a client on its way."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.errors import NodeLostError, QueueTimeoutError

if TYPE_CHECKING:
    from offload_builder.node.job import BuildJob
    from offload_proto.v1.node_service_pb2 import Result

BESIDE_SECONDS = 30.0


@dataclass
class PresentBuild:
    """A build that is here, from its ticket until its client has left."""

    job: BuildJob | None = None
    """None while its project is being opened."""
    task: asyncio.Task[Result] | None = None
    canceled: str = ""
    over: bool = False
    """It has ended and its slot is free; the client may still fetch the image."""

    def cancel(self, reason: str) -> None:
        """End it; the first reason holds."""
        if not self.canceled:
            self.canceled = reason
            if self.task is not None:
                self.task.cancel()


class Slots:
    """Who has a slot of the node.

    Attributes:
        builds: the builds that are here, by their ids.
        draining: no build is accepted any more.
        empty: set while no build is here.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.builds: dict[str, PresentBuild] = {}
        self.draining = False
        self.empty = asyncio.Event()
        self.empty.set()
        self._reserved: dict[str, float] = {}

    @property
    def busy(self) -> int:
        """How many slots builds have."""
        return len(self.running())

    def running(self) -> list[str]:
        """Return the builds that have not ended."""
        return [build_id for build_id, build in self.builds.items() if not build.over]

    def reserved(self) -> list[str]:
        """Return the builds that are expected."""
        return list(self._reserved)

    def offer(self, build_id: str, hold_seconds: float) -> str:
        """Reserve a slot for a build; return why not, or an empty text."""
        now = time.monotonic()
        self._reserved = {key: until for key, until in self._reserved.items() if until > now}
        if self.draining:
            return "the node is draining"
        if build_id in self.builds:
            return "the build is at this node already"
        others = len(self._reserved) - (build_id in self._reserved)
        if self.busy + others >= self._count:
            return "all slots of the node are taken"
        self._reserved[build_id] = now + hold_seconds
        return ""

    def reserve_beside(self, build_id: str) -> None:
        """Expect a build that shares the slot of another one of its client."""
        self._reserved[build_id] = time.monotonic() + BESIDE_SECONDS

    def give_back(self, build_id: str) -> None:
        """Expect a build no more."""
        self._reserved.pop(build_id, None)

    def take(self, build_id: str) -> PresentBuild:
        """Give an expected build its slot.

        Raises:
            NodeLostError: the node is about to stop.
            QueueTimeoutError: the client came too late, its slot was given away.
        """
        if self.draining:
            raise NodeLostError("the node is shutting down; start the build again")
        if self._reserved.pop(build_id, None) is None:
            raise QueueTimeoutError(
                "this build came too late to its node, its slot was given away; "
                "start the build again"
            )
        build = self.builds[build_id] = PresentBuild()
        self.empty.clear()
        return build

    def forget(self, build_id: str) -> None:
        """Let go of a build that has ended and whose client has left."""
        self.builds.pop(build_id, None)
        if not self.builds:
            self.empty.set()

    def drain(self) -> None:
        """Accept nothing more."""
        self.draining = True
        self._reserved.clear()

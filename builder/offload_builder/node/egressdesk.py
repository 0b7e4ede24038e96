"""Brings what the firewall and the resolver tell of a project to the builds whose steps it was."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import structlog

from offload_builder.node.stepmatching import ANY, LIKELY, SURE, matching_steps
from offload_builder.node.stepsources import KnownStep, StepSources
from offload_core.aio import TaskSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from offload_builder.egress.policy.model import Policy
    from offload_builder.node.egressreport import BuildEgress, Candidate
    from offload_builder.node.egresstold import Told

log = structlog.get_logger(__name__)

MAX_WAITING = 2000
_MAX_AT_ONCE = 50
PATIENCE_SECONDS = 1.0
"""BuildKit may tell that a step has begun only after its first packet."""
_LOCAL = ("[internal] load build", "[internal] load .docker", "[internal] load remote build")
"""Steps that read what comes with the build."""
_NEWS_SECONDS = 0.3
"""So long it takes, at most, until BuildKit's news of a step that has begun are here."""
_PAUSE_SECONDS = 0.05
_KERNEL_SECONDS = 0.05
"""What the kernel logs comes in bundles, at most this long after it happened."""


class _Waiting(NamedTuple):
    told: Told
    step: KnownStep | None
    since: float


class EgressDesk:
    """Of one place; an async context manager.

    Args:
        policy: returns what holds there.

    Attributes:
        sources: knows the steps by their addresses.
    """

    def __init__(self, policy: Callable[[], Policy]) -> None:
        self.sources = StepSources()
        self._policy = policy
        self._builds: list[BuildEgress] = []
        self._waiting: deque[_Waiting] = deque()
        self._news, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._tasks = TaskSet()

    async def __aenter__(self) -> Self:
        self._tasks.start(self._run(), name="egress.desk")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    @contextmanager
    def reporting(self, build: BuildEgress) -> Iterator[None]:
        """Tell a build what it reached and was refused, while the block runs."""
        self._builds.append(build)
        try:
            yield
        finally:
            self._builds.remove(build)

    def hear(self, told: Told) -> None:
        """Hear of a connection or a name; of a flood the rest is only counted in the kernel."""
        if not self._builds or len(self._waiting) >= MAX_WAITING:
            return
        self._waiting.append(_Waiting(told, self.sources.at(told.source), time.monotonic()))
        self._idle.clear()
        self._news.set()

    async def settled(self) -> None:
        """Wait until a build that has failed knows what it was refused."""
        await asyncio.sleep(_KERNEL_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * PATIENCE_SECONDS):
                await self._idle.wait()

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            late: deque[_Waiting] = deque()
            while self._waiting:
                # A flood must not hold up the loop.
                for _ in range(min(len(self._waiting), _MAX_AT_ONCE)):
                    item = self._waiting.popleft()
                    if not self._deliver(item):
                        late.append(item)
                await asyncio.sleep(0)
            self._waiting = late
            if late:
                await asyncio.sleep(_PAUSE_SECONDS)
                self._news.set()
            else:
                self._idle.set()

    def _deliver(self, item: _Waiting) -> bool:
        """Tell the builds; False to try again."""
        age = time.monotonic() - item.since
        late = age >= PATIENCE_SECONDS
        if item.step is not None:
            # The right one may not be known yet, and one that is nearly alike may be.
            least = SURE if age < _NEWS_SECONDS else ANY if late else LIKELY
            found = self._steps_of(item.step, least)
            if len(found) == 1 and not late:
                item.step.vertex = found[0]
        else:
            found = self._sources_of()
        if not found and not late:
            return False
        policy = self._policy()
        for build in list(self._builds):
            own = [digest for digest in found if build.knows(digest)]
            # Better everybody hears of it than nobody: a daemon has builds of one project only.
            if own or not found:
                self._tell(build, item.told, own, policy)
        return True

    @staticmethod
    def _tell(build: BuildEgress, told: Told, steps: list[str], policy: Policy) -> None:
        try:
            build.take(told, steps, policy)
        except Exception as error:
            log.error("egress.report.failed", build_id=build.build_id, exc_info=error)

    def _candidates(self) -> dict[str, Candidate]:
        found: dict[str, Candidate] = {}
        for build in self._builds:
            found |= build.candidates()
        return found

    def _steps_of(self, step: KnownStep, least: float) -> list[str]:
        """Return the steps that a container may be; several where builds run the same twice."""
        if step.vertex:
            return [step.vertex]
        taken = {other.vertex for other in self.sources.running() if other is not step}
        names = {
            digest: item.name
            for digest, item in self._candidates().items()
            if digest not in taken and item.begun_at <= step.begun_at
        }
        return matching_steps(step.arguments, names, least=least)

    def _sources_of(self) -> list[str]:
        """Return what BuildKit may have fetched by itself, and steps that share its address."""
        names = {key: item.name for key, item in self._candidates().items() if item.ended is None}
        for step in self.sources.running():
            for digest in self._steps_of(step, LIKELY):
                names.pop(digest, None)
        return [digest for digest, name in names.items() if not name.startswith(_LOCAL)]

"""Looks after registries that a build waits for: BuildKit waits for a silent one without a word."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from offload_builder.buildkit.failure import SolveFailure
from offload_builder.node.pushtargets import split_name
from offload_cache.mirror.errors import AwayError
from offload_core.aio import TaskSet, finish
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.poollogins import PoolLogins
    from offload_proto.v1.events_pb2 import ProgressBatch

T = TypeVar("T")

BEGIN_SECONDS = 0.3
PROBE_SECONDS = 1.2
GIVE_UP_SECONDS = 30.0
"""A registry that has not answered once for so long is taken for dead. The last questions are given
a third of it each: on a line that the push itself fills, an answer takes seconds."""
_LOAD = "load metadata for "
_PUSH = "pushing "
_CANCEL_SECONDS = 10.0


class RegistryWatch:
    """The registries of one build; `close` at the end.

    Args:
        link: to the person, who is told.
        pool: knows the way to registries; None when the node asks none.
        targets: hosts that the build pushes to.
    """

    def __init__(self, link: ClientLink, pool: PoolLogins | None, targets: Sequence[str]) -> None:
        self._link = link
        self._pool = pool
        self._targets = targets
        self._waiting: dict[str, set[str]] = {}
        self._tasks = TaskSet()
        self._dead = asyncio.Event()
        self._sentence = ""

    def see(self, batch: ProgressBatch) -> None:
        """Learn from the progress of the build what it waits for."""
        for vertex in batch.vertices:
            _, found, name = vertex.name.partition(_LOAD)
            if found and vertex.HasField("started_at"):
                host = split_name(name)[0]
                self._note(host, vertex.digest, done=vertex.HasField("completed_at"))
        for status in batch.statuses:
            if status.id.startswith(_PUSH):
                done = status.HasField("completed_at")
                for host in self._targets:
                    self._note(host, f"{status.vertex} {status.id}", done=done)

    def _note(self, host: str, what: str, *, done: bool) -> None:
        reasons = self._waiting.setdefault(host, set())
        if done:
            reasons.discard(what)
            return
        idle = not reasons
        reasons.add(what)
        if idle and self._pool is not None:
            self._tasks.start(self._look(self._pool, host), name=f"registry.{host}")

    async def _look(self, pool: PoolLogins, host: str) -> None:
        loop = asyncio.get_running_loop()
        began, patience, told = loop.time(), PROBE_SECONDS, False
        await asyncio.sleep(BEGIN_SECONDS)
        while self._waiting[host]:
            if await _answers(pool, host, patience):
                return
            if not self._waiting[host]:
                return
            seconds = loop.time() - began
            sentence = (
                f"the registry {host} has not answered for {seconds:.0f} seconds; check its "
                "address, and that the node can reach it"
            )
            if seconds >= GIVE_UP_SECONDS:
                self._sentence = sentence
                self._dead.set()
                return
            if not told:
                told = True
                await self._link.notice(f"{sentence}; the build waits for it")
            patience = GIVE_UP_SECONDS / 3

    async def guard(self, solve: Coroutine[Any, Any, T]) -> T | SolveFailure:
        """Await a solve, and end it when a registry that it waits for is dead."""
        work = asyncio.ensure_future(solve)
        dead = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait((work, dead), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            return SolveFailure(message=self._sentence)
        finally:
            dead.cancel()
            if not work.done():
                work.cancel()
                await finish(asyncio.wait((work,)), _CANCEL_SECONDS)

    async def close(self) -> None:
        """Stop looking."""
        await self._tasks.close()


async def _answers(pool: PoolLogins, host: str, patience: float) -> bool:
    """Say whether a registry is not silent; whatever else is wrong, BuildKit will tell."""
    try:
        connection = pool.connection(host)
        async with asyncio.timeout(patience):
            answer = await connection.open("GET", f"{connection.endpoint.base_url}/", {})
        answer.release()
    except TimeoutError:
        return False
    except (AwayError, ConfigError):
        pass
    return True

"""Looking names up: from the cache, with others who ask the same, or at the servers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import dns.name
import dns.rcode
import dns.rdatatype
import structlog

from offload_builder.egress.resolver.answers import (
    LONGEST_SECONDS,
    MAX_CHAIN,
    Found,
    clamped,
    read_step,
)
from offload_builder.egress.resolver.upstream import NoAnswerError
from offload_core.aio import TaskSet

if TYPE_CHECKING:
    from offload_builder.egress.resolver.answercache import AnswerCache
    from offload_builder.egress.resolver.metrics import ResolverMetrics
    from offload_builder.egress.resolver.upstream import Asker

_log = structlog.get_logger(__name__)
_WHOLE_SECONDS = 6.0
_FAILURE_SECONDS = 1
"""For so long nobody asks again what no server answered."""


class Lookup:
    """The lookups of one project, so that none can see or change what another has looked up.

    Args:
        asker: asks the servers.
        cache: of this project.
        at_once: questions to servers that may be open together; more wait.
    """

    def __init__(
        self, asker: Asker, cache: AnswerCache, metrics: ResolverMetrics, at_once: int
    ) -> None:
        self._asker = asker
        self._cache = cache
        self._metrics = metrics
        self._turn = asyncio.Semaphore(at_once)
        self._open: dict[tuple[str, dns.rdatatype.RdataType], asyncio.Task[Found]] = {}
        self._tasks = TaskSet(_unexpected)

    async def find(self, name: str, qtype: dns.rdatatype.RdataType) -> tuple[Found, int]:
        """Return what stands behind a name, and for how many seconds that is good.

        A name that no server answers is SERVFAIL.
        """
        key = (name, qtype)
        if (kept := self._cache.get(key)) is not None:
            self._metrics.hits.inc()
            return kept
        task = self._open.get(key)
        if task is None:
            self._metrics.misses.inc()
            task = self._tasks.start(self._ask(key), name=f"name {name[:60]}")
            self._open[key] = task
            task.add_done_callback(lambda _: self._open.pop(key, None))
        else:
            self._metrics.joined.inc()
        found = await asyncio.shield(task)
        return found, found.seconds

    async def close(self) -> None:
        """End what is open."""
        await self._tasks.close()

    async def _ask(self, key: tuple[str, dns.rdatatype.RdataType]) -> Found:
        try:
            async with asyncio.timeout(_WHOLE_SECONDS), self._turn:
                found = await self._follow(*key)
        except (NoAnswerError, TimeoutError):
            found = Found(dns.rcode.SERVFAIL, seconds=_FAILURE_SECONDS)
        self._cache.put(key, found)
        return found

    async def _follow(self, name: str, qtype: dns.rdatatype.RdataType) -> Found:
        """Ask until the chain of names has an end."""
        chain: list[str] = []
        ttl = LONGEST_SECONDS
        owner = dns.name.from_text(name)
        while True:
            step = read_step(await self._asker.ask(owner, qtype), owner, qtype)
            chain += step.chain
            ttl = min(ttl, step.ttl)
            if not step.rest:
                break
            if len(chain) > MAX_CHAIN or len(set(chain)) < len(chain):
                _log.info("dns.chain.endless", name=name, links=len(chain))
                return Found(dns.rcode.SERVFAIL, seconds=_FAILURE_SECONDS)
            owner = dns.name.from_text(step.rest)
        return Found(
            step.rcode, tuple(chain), tuple(step.addresses), tuple(step.services), clamped(ttl)
        )


def _unexpected(name: str, error: BaseException) -> None:
    _log.error("dns.lookup.failed", lookup=name, exc_info=error)

"""Runs blocking requests to the shared store in threads, and learns from how they end.

A read that waits for a store that others found ill ends at once, and is not tried again until a
probe in the background found the store well: a build pays for an outage once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import structlog

from offload_cache.circuits import READS, StoreCircuits, Verb
from offload_cache.s3failures import Trouble, trouble_of
from offload_core.aio import TaskSet
from offload_core.errors import CacheUnavailableError, NotFoundError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.health import StoreHealth
    from offload_cache.objectstore import SinkGate
    from offload_cache.statistics import CacheStatistics

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_ALIVE_SECONDS = 1.0
"""A read that got bytes so recently goes on although the store is given up."""


class StoreCalls:
    """Two thread pools, the circuits of the store, and its probe.

    Args:
        name: of the store, for people.
        health: bounds of the circuits.
        statistics: counters to use.
        readers: threads for what builds wait for.
        writers: threads for uploads.
        probe_seconds: patience of a probe.
    """

    def __init__(
        self,
        name: str,
        health: StoreHealth,
        statistics: CacheStatistics,
        *,
        readers: int,
        writers: int,
        probe_seconds: float,
    ) -> None:
        self.circuits = StoreCircuits(health)
        self._name = name
        self._statistics = statistics
        self._probe_seconds = probe_seconds
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="s3-read")
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="s3-write")
        self._prober = ThreadPoolExecutor(1, thread_name_prefix="s3-probe")
        self._given_up = asyncio.Event()
        self._tasks = TaskSet(on_error=self._crashed)
        self._probing: asyncio.Task[None] | None = None

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("cache.store.crashed", task=name, error=repr(error))

    async def close(self) -> None:
        """End the probe, and the threads as soon as their requests have ended."""
        await self._tasks.close()
        for executor in (self._readers, self._writers, self._prober):
            executor.shutdown(wait=False, cancel_futures=True)

    async def run(
        self,
        verb: Verb,
        work: Callable[[], T],
        deadline_seconds: float | None,
        *,
        gate: SinkGate | None = None,
        probe: Callable[[], object] | None = None,
    ) -> T:
        """Run blocking work in a thread.

        Args:
            verb: what it asks for.
            work: one or more requests.
            deadline_seconds: bound of the whole, None to leave it to the connection's bounds.
            gate: where the bytes of a read go; shows whether any come.
            probe: a small request that shows whether what failed works again.
        """
        self.circuits.check(verb)
        begun = threading.Event()

        def begin() -> T:
            begun.set()
            return work()

        executor = self._readers if verb in READS else self._writers
        future = asyncio.get_running_loop().run_in_executor(executor, begin)
        weight = self.circuits.reads.limit  # what cost its caller seconds is not tried again
        try:
            try:
                async with asyncio.timeout(deadline_seconds):
                    result = await self._outcome(future, verb, gate)
            except TimeoutError as error:
                if begun.is_set():
                    if not future.done():  # the caller's patience was short, not ours
                        weight = 2
                    cause = str(error) or f"no answer in {deadline_seconds or 0:.1f} s"
                    raise _SlowError(cause) from error
                # It waited for a thread of ours; that says nothing about the store.
                self.circuits.abandoned(verb)
                raise CacheUnavailableError("too many transfers are under way") from error
        except asyncio.CancelledError:
            self.circuits.abandoned(verb)
            raise
        except _GivenUp:
            self.circuits.abandoned(verb)
            raise CacheUnavailableError(self.circuits.state) from None
        except CacheUnavailableError as error:
            if begun.is_set():  # no keys to sign with
                raise self._failure(verb, Trouble(error.message), 1, probe) from error
            raise
        except OffloadError:
            self._answered(verb)  # "not there" is an answer
            raise
        except Exception as error:
            trouble = trouble_of(error)
            raise self._failure(verb, trouble, weight if trouble.is_final else 1, probe) from error
        finally:
            future.cancel()
        self._answered(verb)
        return result

    def _answered(self, verb: Verb) -> None:
        # One that was well on its way says nothing of those that got nothing; the probe will.
        if verb not in READS or not self.circuits.reads.is_open:
            self.circuits.succeeded(verb)

    async def _outcome(self, future: asyncio.Future[T], verb: Verb, gate: SinkGate | None) -> T:
        """Wait for a thread; not longer than the store is believed in, unless bytes come."""
        if verb not in READS:
            return await asyncio.shield(future)
        while not future.done():
            given_up = asyncio.ensure_future(self._given_up.wait())
            try:
                await asyncio.wait((future, given_up), return_when=asyncio.FIRST_COMPLETED)
            finally:
                given_up.cancel()
            if future.done():
                break
            if gate is None or time.monotonic() - gate.heard_at > _ALIVE_SECONDS:
                raise _GivenUp
            await asyncio.wait((future,), timeout=_ALIVE_SECONDS / 4)
        return future.result()

    def _failure(
        self, verb: Verb, trouble: Trouble, weight: int, probe: Callable[[], object] | None
    ) -> CacheUnavailableError:
        if trouble.is_refusal:
            self.circuits.refused(verb, trouble.cause)
        else:
            self.circuits.failed(verb, trouble.cause, weight=weight)
        self._statistics.shared_failures += 1
        if verb in READS and probe is not None and self.circuits.reads.is_open:
            self._given_up.set()
            if self._probing is None or self._probing.done():
                self._probing = self._tasks.start(self._probe(verb, probe), name="s3-probe")
        return CacheUnavailableError(f"the shared cache at {self._name} failed: {trouble.cause}")

    async def _probe(self, verb: Verb, probe: Callable[[], object]) -> None:
        """Repeat what failed until it works, so that no build has to."""
        reads = self.circuits.reads
        loop = asyncio.get_running_loop()
        try:
            while reads.is_open:
                await asyncio.sleep(reads.pause_left)
                if not reads.begin_probe():
                    continue
                try:
                    async with asyncio.timeout(self._probe_seconds):
                        await loop.run_in_executor(self._prober, probe)
                except Exception as error:  # noqa: BLE001 - whatever it is, the store is not well
                    trouble = trouble_of(error)
                    if isinstance(error, NotFoundError):
                        self.circuits.succeeded(verb)
                    elif trouble.is_refusal:
                        self.circuits.refused(verb, trouble.cause)
                    else:
                        reads.failed(trouble.cause)
                else:
                    self.circuits.succeeded(verb)
        finally:
            self._given_up.clear()


class _GivenUp(Exception):  # noqa: N818 - never leaves this module
    """Others found the store ill while this call waited."""


class _SlowError(TimeoutError):
    """The store did not answer in time."""

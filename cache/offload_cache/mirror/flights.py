"""One piece of work for all who want the same thing at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from offload_cache.mirror.errors import AwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable

    from offload_core.aio import TaskSet

K = TypeVar("K", bound="Hashable")
T = TypeVar("T")


class Flights(Generic[K, T]):
    """Work under way, by what it is for. It goes on when those who wait are cancelled.

    Args:
        tasks: runs the work; its owner ends it.
        what: for the names of tasks.
    """

    def __init__(self, tasks: TaskSet, what: str) -> None:
        self._tasks = tasks
        self._what = what
        self._flights: dict[K, asyncio.Task[T]] = {}

    async def join(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the work under way for `key`; start it when there is none.

        Raises:
            AwayError: the node stops.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._tasks.start(work(), name=self._what)
            self._flights[key] = flight
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        try:
            return await asyncio.shield(flight)
        except asyncio.CancelledError:
            if flight.cancelled():
                raise AwayError("the node stops") from None
            raise

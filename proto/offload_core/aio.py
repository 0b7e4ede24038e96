"""The asyncio patterns that everything here uses: kept tasks and bounded clean-up."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from offload_core.errors import find_offload_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

T = TypeVar("T")


class TaskSet:
    """Background tasks with an owner: they are kept, their errors are seen, `close` ends them.

    For work that outlives the call that started it; inside one call use `asyncio.TaskGroup`.
    """

    def __init__(self, on_error: Any = None) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_error = on_error

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run a coroutine in the background; `on_error(name, exception)` hears of its failure."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._on_error:
            self._on_error(task.get_name(), error)

    async def drain(self, timeout: float) -> bool:
        """Wait until all tasks are done; False when some still run after `timeout` seconds."""
        deadline = asyncio.get_running_loop().time() + timeout
        while self._tasks:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            await asyncio.wait(self._tasks, timeout=left)
        return True

    async def close(self, timeout: float = 5.0) -> None:
        """Cancel what still runs and wait for it, at most `timeout` seconds."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)


async def for_each(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], *, parallel: int
) -> None:
    """Do some work on each item, on at most `parallel` of them at a time.

    The first error ends all of it; it is raised as it is when it is one of ours.
    """
    pending = iter(items)

    async def some() -> None:
        for item in pending:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(some())
    except ExceptionGroup as failed:
        raise find_offload_error(failed) or failed from None


async def stop(*tasks: asyncio.Future[Any], expected: tuple[type[BaseException], ...] = ()) -> None:
    """Cancel tasks and wait for their ends; errors that are not `expected` are raised.

    Unlike awaiting a task, this does not take a cancellation of the caller for that of the task.
    """
    for task in tasks:
        task.cancel()
        # Also when the caller is cancelled and looks at no end.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    await asyncio.wait(tasks)
    for task in tasks:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, expected):
            raise error


async def finish(awaitable: Awaitable[T], timeout: float) -> T | None:
    """Await clean-up that must run even while we are being cancelled; None when it took too long.

    The cancellation is raised again after the clean-up.
    """
    task = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    deadline = asyncio.get_running_loop().time() + timeout
    while not task.done():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            task.cancel()
            break
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    if not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None
    return task.result()

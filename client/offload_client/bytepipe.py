"""Bytes from a coroutine to a blocking reader in a thread, bounded in both directions.

The docker SDK, tarfile and the decompressors read from blocking objects; the bytes come from
asyncio. `stream_through` joins the two and ends both, whichever fails first.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from offload_core.aio import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

T = TypeVar("T")

_PIECE_BYTES = 1 << 20
_SLOTS = 8
_ABORT_SECONDS = 10.0


class PipeAbortedError(Exception):
    """The writing side gave up; what was read so far is incomplete."""


class BytePipe:
    """A queue of at most 8 pieces of at most 1 MiB; one coroutine writes, one thread reads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(_SLOTS)
        self._pieces: queue.SimpleQueue[bytes | bool] = queue.SimpleQueue()
        self._rest = b""
        self._rest_at = 0
        self._ended = False

    async def write(self, data: bytes) -> None:
        """Hand bytes to the reader; waits while the queue is full."""
        for start in range(0, len(data), _PIECE_BYTES):
            await self._free.acquire()
            piece = data if len(data) <= _PIECE_BYTES else data[start : start + _PIECE_BYTES]
            self._pieces.put(piece)

    def finish(self) -> None:
        """Tell the reader that everything has been written."""
        self._pieces.put(True)

    def abort(self) -> None:
        """Make the reader fail with `PipeAbortedError`."""
        self._pieces.put(False)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces; for the reading thread."""
        while piece := self._next():
            yield piece

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, b"" at the end; for the reading thread.

        Fewer bytes than asked for come only at the end, as tarfile and gzip expect.
        """
        parts: list[bytes] = []
        wanted = size if size >= 0 else -1
        while wanted:
            if self._rest_at == len(self._rest):
                self._rest, self._rest_at = self._next(), 0
                if not self._rest:
                    break
            end = len(self._rest) if wanted < 0 else self._rest_at + wanted
            part = self._rest[self._rest_at : end]
            self._rest_at += len(part)
            parts.append(part)
            if wanted > 0:
                wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next(self) -> bytes:
        if self._ended:
            return b""
        piece = self._pieces.get()
        if isinstance(piece, bytes):
            # The loop is gone when the program ends while this thread still reads.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._free.release)
            return piece
        if not piece:
            raise PipeAbortedError("the stream was given up")
        self._ended = True
        return b""


def in_thread(function: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """Run a blocking call in a daemon thread of its own and return its future.

    A daemon thread, because an executor's thread that hangs in a socket would keep the whole
    program from ending after Ctrl-C.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def resolve(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function()
        except BaseException as raised:  # noqa: BLE001 - handed to the awaiting coroutine
            error = raised
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(resolve, result, error)

    # Its events belong to the command that started it.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name=name, daemon=True).start()
    return future


async def stream_through(
    produce: Callable[[BytePipe], Awaitable[None]],
    consume: Callable[[BytePipe], T],
    *,
    name: str,
) -> T:
    """Run `produce` as a coroutine and `consume` in a thread, joined by a pipe.

    The error of the producer wins over the one that it causes in the consumer. When the consumer
    ends first its result counts and the producer is cancelled. On cancellation the consumer is
    told to give up and waited for, at most 10 seconds.

    Returns:
        The result of `consume`.
    """
    pipe = BytePipe()

    async def write_all() -> None:
        await produce(pipe)
        pipe.finish()

    consumer = in_thread(lambda: consume(pipe), name=name)
    producer = asyncio.ensure_future(write_all())
    producer.add_done_callback(lambda done: done.cancelled() or done.exception())
    both: set[asyncio.Future[Any]] = {consumer, producer}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if producer.done():
            producer.result()
            # Not "await consumer": a cancellation would then mark it done while it runs.
            await asyncio.wait([consumer])
        return consumer.result()
    finally:
        pipe.abort()
        producer.cancel()
        await finish(asyncio.wait(both, timeout=_ABORT_SECONDS), _ABORT_SECONDS + 1)

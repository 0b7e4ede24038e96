"""Steps of the client itself, shown among BuildKit's."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Self

from offload_client.progress.clock import NANOSECONDS, LocalClock
from offload_proto.v1.events_pb2 import (
    ProgressBatch,
    Vertex,
    VertexLog,
    VertexStatus,
    VertexWarning,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from google.protobuf.timestamp_pb2 import Timestamp

# A counter is told to the display this often; its last value always is.
_COUNTER_INTERVAL_SECONDS = 0.1

_clock = LocalClock()


class LocalStep:
    """One step of the client, for example "[offload] transferring build context".

    As a context manager it ends with the block: done, failed with the exception's message, or
    canceled. To be used by one thread at a time; calls are cheap enough for every chunk sent.
    """

    def __init__(self, name: str, emit: Callable[[ProgressBatch], None], ordinal: int) -> None:
        """Start the step now.

        Args:
            name: as shown, with its "[offload] " in front.
            emit: takes the messages that tell of it.
            ordinal: tells apart steps of the same name.
        """
        key = hashlib.sha256(f"offload local step {ordinal} {name}".encode())
        self._digest = f"sha256:{key.hexdigest()}"
        self._emit = emit
        self._started_ns = _clock.now_ns()
        self._name = name
        self.naming: Callable[[str], str] = str
        """Makes what is shown of a new name."""
        self._counters: dict[str, _LocalCounter] = {}
        self._ended = False
        self._emit(ProgressBatch(vertices=[self._vertex()]))

    def rename(self, name: str) -> None:
        """Change what the step is called, for example when a queue position changes."""
        name = self.naming(name)
        if name != self._name and not self._ended:
            self._name = name
            self._emit(ProgressBatch(vertices=[self._vertex()]))

    def progress(self, counter: str, current: int, total: int = 0, *, note: str = "") -> None:
        """Set a counter below the step.

        Args:
            counter: what is counted, for example "transferring context:".
            current: bytes so far.
            total: bytes at the end; 0 when unknown.
            note: shown behind the numbers, for example a rate.
        """
        if self._ended:
            return
        state = self._counters.get(counter)
        now = time.monotonic()
        if state is None:
            state = self._counters[counter] = _LocalCounter(counter, _clock.now_ns())
        state.current, state.total, state.note = current, total, note
        if now < state.next_emit:
            return
        state.next_emit = now + _COUNTER_INTERVAL_SECONDS
        self._emit(ProgressBatch(statuses=[state.message(self._digest, _clock.now_ns())]))

    def progress_done(self, counter: str) -> None:
        """End a counter with the value that it has."""
        state = self._counters.pop(counter, None)
        if state is not None:
            done_ns = _clock.now_ns()
            self._emit(ProgressBatch(statuses=[state.message(self._digest, done_ns, done_ns)]))

    def log(self, text: str) -> None:
        """Print a line below the step."""
        data = text.encode("utf-8", "replace") + b"\n"
        log = VertexLog(vertex=self._digest, stream=1, data=data)
        _set(log.timestamp, _clock.now_ns())
        self._emit(ProgressBatch(logs=[log]))

    def warn(self, text: str) -> None:
        """Add a warning, which is also listed at the end of the build."""
        warning = VertexWarning(vertex=self._digest, level=1, short=text.encode())
        self._emit(ProgressBatch(warnings=[warning]))

    def done(self, *, cached: bool = False, seconds_ago: float = 0.0) -> None:
        """End the step; nothing happens when it has ended.

        Args:
            cached: it had nothing to do.
            seconds_ago: it had ended before, which is known only now.
        """
        self._end(cached=cached, error="", seconds_ago=seconds_ago)

    def fail(self, error: str) -> None:
        """End the step with an error."""
        self._end(cached=False, error=error or "failed")

    def cancel(self) -> None:
        """End the step because the build was stopped."""
        self._end(cached=False, error="context canceled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.done()
        elif isinstance(error, Exception):
            self.fail(str(error))
        else:
            self.cancel()

    def _end(self, *, cached: bool, error: str, seconds_ago: float = 0.0) -> None:
        if self._ended:
            return
        self._ended = True
        states, self._counters = self._counters, {}
        vertex = self._vertex()
        vertex.cached = cached
        vertex.error = error
        now = _clock.now_ns()
        ended_ns = max(now - int(seconds_ago * NANOSECONDS), self._started_ns)
        _set(vertex.completed_at, ended_ns)
        done_ns = None if error else ended_ns
        self._emit(
            ProgressBatch(
                vertices=[vertex],
                statuses=[state.message(self._digest, now, done_ns) for state in states.values()],
            )
        )

    def _vertex(self) -> Vertex:
        vertex = Vertex(digest=self._digest, name=self._name)
        _set(vertex.started_at, self._started_ns)
        return vertex


class _LocalCounter:
    def __init__(self, counter: str, started_ns: int) -> None:
        self.id = counter
        self.current = 0
        self.total = 0
        self.note = ""
        self.next_emit = 0.0
        self._started_ns = started_ns

    def message(self, digest: str, now_ns: int, done_ns: int | None = None) -> VertexStatus:
        status = VertexStatus(
            id=self.id,
            vertex=digest,
            name=self.note,
            current=self.current,
            total=self.total,
        )
        _set(status.timestamp, now_ns)
        _set(status.started_at, self._started_ns)
        if done_ns is not None:
            _set(status.completed_at, max(done_ns, self._started_ns))
        return status


def _set(timestamp: Timestamp, moment_ns: int) -> None:
    timestamp.seconds, timestamp.nanos = divmod(moment_ns, NANOSECONDS)

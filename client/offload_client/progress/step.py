"""One step of a build with everything that is known about it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_client.progress.clock import NANOSECONDS

if TYPE_CHECKING:
    from offload_proto.v1.events_pb2 import Vertex, VertexWarning

# BuildKit ends the error of a step that was stopped, rather than failed, with this.
_CANCELED = "context canceled"


@dataclass(slots=True)
class Counter:
    """A counter below a step, for example the transfer of a layer."""

    id: str
    current: int = 0
    total: int = 0
    """Expected end value; 0 when unknown."""
    note: str = ""
    """Shown behind the numbers; of steps of the client."""
    timestamp_ns: int = 0
    started_ns: int | None = None
    completed_ns: int | None = None
    anchor: float = 0.0
    """Local monotonic seconds when it was first heard of."""

    def seconds(self, now: float) -> float:
        """Return how long it has counted, up to `now` (local monotonic seconds)."""
        if self.started_ns is None:
            return 0.0
        if self.completed_ns is not None:
            return max(0.0, (self.completed_ns - self.started_ns) / NANOSECONDS)
        known = (self.timestamp_ns - self.started_ns) / NANOSECONDS
        return max(0.0, now - self.anchor, known)

    def amount(self) -> str:
        """Return "1.5MB / 3MB (11MB/s)", "1.5MB" or nothing."""
        amount = format_bytes(self.current) if self.current or self.total else ""
        if self.total:
            amount += f" / {format_bytes(self.total)}"
        return f"{amount} ({self.note})" if self.note else amount


@dataclass(slots=True)
class Step:
    """A vertex, or a progress group of several vertices that are shown as one."""

    digest: str
    name: str = ""
    inputs: tuple[str, ...] = ()
    cached: bool = False
    error: str = ""
    local: bool = False
    """Made by the client, not by BuildKit."""
    hidden: bool = False
    """Belongs to a group of internal detail of which nothing worth showing has happened."""
    intervals: dict[int, int | None] = field(default_factory=dict)
    """Start to end, both in nanoseconds of the clock of who ran it; None while it runs."""
    anchor: float = 0.0
    """Local monotonic seconds when its first start was heard of."""
    counters: dict[str, Counter] = field(default_factory=dict)
    changed_counters: set[str] = field(default_factory=set)
    """Counters that have news; emptied by who shows them."""
    warnings: list[VertexWarning] = field(default_factory=list)
    log: deque[tuple[float, bytes]] = field(default_factory=deque)
    """Output not yet taken: seconds after the start, bytes as written."""
    log_bytes: int = 0
    """Size of `log`; kept by the view, reset by who empties the log."""
    members: dict[str, Vertex] = field(default_factory=dict)

    @property
    def started_ns(self) -> int | None:
        """First start."""
        return min(self.intervals) if self.intervals else None

    @property
    def completed_ns(self) -> int | None:
        """Last end; None while it runs or waits."""
        if not self.intervals or None in self.intervals.values():
            return None
        return max(end for end in self.intervals.values() if end is not None)

    @property
    def completed(self) -> bool:
        """It ran and is not running now."""
        return bool(self.intervals) and None not in self.intervals.values()

    @property
    def running(self) -> bool:
        """It started and has not ended."""
        return None in self.intervals.values()

    @property
    def canceled(self) -> bool:
        """It was stopped because the build ended."""
        return self.error.endswith(_CANCELED)

    @property
    def failed(self) -> bool:
        """It ended with an error of its own."""
        return bool(self.error) and not self.canceled

    @property
    def title(self) -> str:
        """The name on one line."""
        return " ".join((self.name or self.digest).splitlines())

    def done_seconds(self) -> float:
        """Return the time it ran, without the pauses between several runs."""
        total, reached = 0, 0
        for start, end in sorted((s, e) for s, e in self.intervals.items() if e is not None):
            begin = max(start, reached)
            total += max(0, end - begin)
            reached = max(reached, end)
        return total / NANOSECONDS

    def seconds(self, now: float, node_now: float) -> float:
        """Return the time it ran, up to now when it still runs.

        Args:
            now: local monotonic seconds; a running step is measured from when its start was
                heard of.
            node_now: what the clock of the node that runs it shows at least, in seconds; more
                when the step had long been running before anything was heard of it.
        """
        start = self.started_ns
        if start is None:
            return 0.0
        if not self.running:
            return self.done_seconds()
        return max(0.0, now - self.anchor, node_now - start / NANOSECONDS)


def format_bytes(amount: int) -> str:
    """Return an amount as BuildKit prints it: "123B", "1.23kB", "12.30MB" (powers of 1000)."""
    if abs(amount) < 1000:
        return f"{amount}B"
    value = float(amount)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.2f}{unit}B"
        value /= 1000
    return f"{value:.2f}EB"

"""What a user sees while an image comes back, and the figures of the result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Phase = Literal["checking", "receiving", "unpacking", "tagging", "done"]

_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True)
class LoadProgress:
    """A moment of a load.

    Attributes:
        phase: what is being done; "unpacking" is the engine's own work.
        bytes_received: bytes of layers and configurations that came from the node, compressed.
        bytes_total: bytes known to be needed so far; grows when the engine asks for more.
        layers_received: layers that came whole.
        layers_total: layers known to be needed so far.
    """

    phase: Phase
    bytes_received: int
    bytes_total: int
    layers_received: int
    layers_total: int


class LoadMeter:
    """Counts one load and reports it, at most every 50 ms but each phase at least once."""

    def __init__(self, report: Callable[[LoadProgress], None]) -> None:
        self._report = report
        self._phase: Phase = "checking"
        self._bytes = 0
        self._total = 0
        self._layers = 0
        self._layers_total = 0
        self._reported_at = 0.0
        self.active_at = time.monotonic()

    @property
    def bytes_received(self) -> int:
        """Bytes that came from the node."""
        return self._bytes

    def enter(self, phase: Phase) -> None:
        """Begin a phase; the same one again changes nothing."""
        self.active_at = time.monotonic()
        if phase != self._phase or self._reported_at == 0.0:
            self._phase = phase
            self._send()

    def expect(self, size_bytes: int, *, layers: int = 0) -> None:
        """Add to what is known to be needed."""
        self._total += size_bytes
        self._layers_total += layers

    def received(self, size_bytes: int) -> None:
        """Count bytes from the node."""
        self._bytes += size_bytes
        self.active_at = time.monotonic()
        if self.active_at - self._reported_at >= _INTERVAL_SECONDS:
            self._send()

    def layer_received(self) -> None:
        """Count a whole layer."""
        self._layers += 1
        self._send()

    def touch(self) -> None:
        """Note that the engine said something, so that it does not count as stalled."""
        self.active_at = time.monotonic()

    def _send(self) -> None:
        self._reported_at = time.monotonic()
        self._report(
            LoadProgress(
                phase=self._phase,
                bytes_received=self._bytes,
                bytes_total=max(self._total, self._bytes),
                layers_received=self._layers,
                layers_total=max(self._layers_total, self._layers),
            )
        )


@dataclass(frozen=True)
class LoadResult:
    """What a load did.

    Attributes:
        image_id: what `docker images` shows and `--iidfile` holds: the configuration's digest on
            an engine with a graph driver, the manifest's or index's on one with containerd's store.
        bytes_received: bytes of layers and configurations that came from the node; manifests, a
            few KB, are not counted.
        layers_received: layers that travelled.
        layers_reused: layers that the engine had.
    """

    image_id: str
    bytes_received: int
    layers_received: int
    layers_reused: int

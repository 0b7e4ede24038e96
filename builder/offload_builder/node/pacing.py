"""Fewer, larger batches while much is printed: what a batch costs depends little on its size."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_proto.v1.events_pb2 import ProgressBatch

PAUSE_SECONDS = 0.02
"""Output is passed on at once after such a pause, and at most once per such a time otherwise."""
_DENSE_SECONDS = 0.01
"""Output comes quickly when it comes in such intervals."""
BREATH_SECONDS = 0.005
BATCH_BYTES = 256 << 10
"""Output is passed on when there is so much of it."""


class Pacer:
    """Joins batches of output that come in quick succession; everything else is passed on at once.

    The order is kept and nothing is left out. Belongs to the event loop.

    Attributes:
        dense: output comes quickly now. Who reads it should let some of it gather for
            `BREATH_SECONDS`: reading it together costs much less.
    """

    def __init__(self, emit: Callable[[ProgressBatch], None]) -> None:
        """Pass batches on to `emit`."""
        self._emit = emit
        self._held: ProgressBatch | None = None
        self._held_bytes = 0
        self._emitted_at = float("-inf")
        self._added_at = float("-inf")
        self.dense = False
        self._timer: asyncio.TimerHandle | None = None

    def add(self, batch: ProgressBatch) -> None:
        """Take a batch; it is the pacer's from now on."""
        if self._held is None:
            self._held = batch
        else:
            self._held.MergeFrom(batch)
        self._held_bytes += sum(len(log.data) for log in batch.logs)
        only_logs = not (batch.vertices or batch.statuses or batch.warnings or batch.egress)
        loop = asyncio.get_running_loop()
        now = loop.time()
        self.dense = only_logs and now - self._added_at < _DENSE_SECONDS
        self._added_at = now
        due = self._emitted_at + PAUSE_SECONDS
        if not only_logs or self._held_bytes >= BATCH_BYTES or now >= due:
            self.flush()
        elif self._timer is None:
            self._timer = loop.call_at(due, self.flush)

    def flush(self) -> None:
        """Pass on what is held."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held, self._held, self._held_bytes = self._held, None, 0
        if held is not None:
            self._emitted_at = asyncio.get_running_loop().time()
            self._emit(held)

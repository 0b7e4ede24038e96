"""Numbered lines as `plain` has them, with the output of steps in folds, safe for the CI's log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload_client.progress.printer import OPEN_LINE_BYTES, PlainPrinter

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.ci.orders import Orders
    from offload_client.progress.model import BuildView
    from offload_client.progress.printer import Lane


class _Order(bytes):
    """A line of ours that is meant for the system."""


class FoldedPrinter(PlainPrinter):
    """Prints a line only when it is whole, so that no order can arise from its pieces."""

    def __init__(
        self,
        view: BuildView,
        orders: Orders,
        guard: Callable[[bytes], bytes],
        *,
        folds: bool,
        truncate_names: bool,
    ) -> None:
        """Print the steps of a view.

        Args:
            view: as for PlainPrinter.
            orders: what the system understands.
            guard: makes lines of others harmless.
            folds: fold the output of steps.
            truncate_names: as for PlainPrinter.
        """
        super().__init__(view, truncate_names=truncate_names)
        self._orders = orders
        self._guard = guard
        self._folds = folds and orders.folds
        self._folded = False

    def interject(self, line: str) -> None:
        """Put a line of the client's own between the others, outside of folds."""
        self._unfold()
        super().interject(line)

    def _take(self) -> bytes:
        done: list[bytes] = []
        foreign: list[bytes] = []
        for piece in self._out:
            if isinstance(piece, _Order):
                done += [self._guard(b"".join(foreign)), piece]
                foreign.clear()
            else:
                foreign.append(piece)
        done.append(self._guard(b"".join(foreign)))
        self._out.clear()
        return b"".join(done)

    def _heading(self, lane: Lane) -> None:
        if self._current is not lane:
            self._unfold()
        super()._heading(lane)

    def _print_log(self, lane: Lane) -> None:
        if not self._folded and self._folds:
            self._folded = True
            self._out.append(_Order(self._orders.fold(lane.number, lane.title, time.time())))
        super()._print_log(lane)

    def _print_outcome(self, lane: Lane) -> None:
        if lane.step.failed and self._folded:
            self._out.append(_Order(self._orders.open_last()))
        self._unfold()
        super()._print_outcome(lane)

    def _print_all(self) -> None:
        super()._print_all()
        self._unfold()

    def _unfold(self) -> None:
        if self._folded:
            self._folded = False
            self._out.append(_Order(self._orders.unfold(time.time())))

    def _show_open_line(self, lane: Lane) -> None:
        if lane.open_line is not None and len(lane.open_line) > OPEN_LINE_BYTES:
            self._print_held_back(lane)

    def _print_held_back(self, lane: Lane) -> None:
        line = lane.open_line
        if not line:
            return
        self._out.append(lane.label + bytes(line) + b"\n")
        lane.tail.append(bytes(line))
        lane.open_line = None

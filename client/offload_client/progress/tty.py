"""The interactive form: a header and a row per step, repainted in place.

It looks like `docker build` on a terminal (BuildKit util/progress/progressui). The rows are
painted with plain ECMA-48 sequences. The cursor is hidden only within a frame, so that it is
there again however the process ends.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from offload_client.progress.base import FRAME_SECONDS, ViewDisplay
from offload_client.progress.cells import fit, printable, text_width
from offload_client.progress.loglines import stamped_lines
from offload_client.progress.rows import DEFAULT_LOG_LINES, Row, choose_rows, step_rows
from offload_client.progress.style import Palette, paint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from offload_client.progress.output import Sink
    from offload_client.progress.step import Step
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Failure

_HIDE = "\x1b[?25l"
_SHOW = "\x1b[?25h"
_ERASE_RIGHT = "\x1b[K"
_ERASE_BELOW = "\x1b[J"
# Output of a step is kept until it has succeeded, for the report of a failure. BuildKit keeps as
# much by default; a terminal is no place for more.
_KEPT_LOG_BYTES = 2 << 20
_FALLBACK_SIZE = (80, 24)


class TtyDisplay(ViewDisplay):
    """Paints at most ten frames a second; a slow terminal gets fewer."""

    def __init__(
        self,
        sink: Sink,
        environment: Mapping[str, str],
        *,
        expand_warnings: bool = False,
        doing: str = "Building",
    ) -> None:
        """Paint on a terminal.

        Args:
            sink: a terminal, not necessarily that of this process.
            environment: NO_COLOR, BUILDKIT_COLORS and BUILDKIT_TTY_LOG_LINES are respected.
            expand_warnings: give warnings with their details at the end.
            doing: what the first line says.
        """
        self._doing = doing
        palette = Palette.of_environment(environment)
        super().__init__(
            sink, expand_warnings=expand_warnings, palette=palette, tick_seconds=FRAME_SECONDS
        )
        wanted = environment.get("BUILDKIT_TTY_LOG_LINES", "")
        self._log_lines = int(wanted) if wanted.isdecimal() and int(wanted) else DEFAULT_LOG_LINES
        self._painter = Painter()
        self._notices: list[str] = []
        self._lost: dict[str, int] = {}

    def _merge(self, batch: ProgressBatch, *, local: bool) -> int:
        super()._merge(batch, local=local)
        for key in self.view.take_news():
            step = self.view.steps[key]
            step.changed_counters.clear()
            if step.log and step.completed and not step.error:
                step.log.clear()
                step.log_bytes = 0
            while step.log_bytes > _KEPT_LOG_BYTES:
                size = len(step.log.popleft()[1])
                step.log_bytes -= size
                self._lost[key] = self._lost.get(key, 0) + size
        # Nothing waits: a frame shows only the end of the logs.
        return 0

    def _notice(self, level: str, text: str) -> None:
        text = printable(text)
        warning = level == "warning"
        self._notices.append(paint(f"WARNING: {text}", self._palette.warning) if warning else text)

    def _render(self) -> bytes:
        width, height = _size(self._sink.descriptor)
        now = time.monotonic()
        rows = choose_rows(self.view, now, height - 2, self._log_lines)
        return self._frame(rows, width, height, now)

    def _final(self, failure: Failure | None) -> bytes:
        width, height = _size(self._sink.descriptor)
        now = time.monotonic()
        frame = b""
        if self.view.steps or self._notices:
            rows = [row for step in self.view.shown for row in step_rows(step, self.view, now)]
            completed, total = self.view.counts()
            suffix = " FINISHED" if failure is None and 0 < completed == total else ""
            # The cursor must end below the frame, even where that scrolls.
            frame = self._frame(rows, width, max(height, 2), now, suffix=suffix)
        return frame + self._ending(failure)

    def _frame(
        self, rows: list[Row], width: int, height: int, now: float, *, suffix: str = ""
    ) -> bytes:
        completed, total = self.view.counts()
        header = f"[+] {self._doing} {self.view.elapsed_seconds(now):.1f}s ({completed}/{total})"
        header += suffix
        # The last column stays free: writing there makes some terminals wrap at once.
        columns = max(1, width - 1)
        lines = [(fit(header, columns), "")]
        lines += [(row.text(columns), row.colour(self._palette)) for row in rows]
        notices, self._notices = self._notices, []
        return self._painter.frame(lines, notices, width, height)

    def _log_tail(self, step: Step) -> list[bytes]:
        """Return all output of a step: while it ran, only the end of it could be seen."""
        lines: list[bytes] = []
        if lost := self._lost.get(step.digest):
            lines.append(b"... %d bytes of earlier output are not kept" % lost)
        return lines + stamped_lines(step.log)


class Painter:
    """Replaces one frame by the next; knows what stands on the screen."""

    def __init__(self) -> None:
        self._widths: list[int] = []
        """Cells of each line of the last frame."""
        self._columns = 0
        """Width of the terminal at that frame."""

    def frame(
        self, lines: list[tuple[str, str]], notices: Iterable[str], width: int, height: int
    ) -> bytes:
        """Return what turns the last frame into this one.

        Args:
            lines: text without control characters and its colour; each fits the width.
            notices: lines that stay above the frame for good.
            width: columns of the terminal now.
            height: its rows.
        """
        out = [_HIDE, "\r"]
        above = min(self._rows_above(width), max(height - 1, 0))
        if above:
            out.append(f"\x1b[{above}A")
        out += [f"{_ERASE_RIGHT}{notice}\r\n" for notice in notices]
        # Erased first: at the right edge, erasing afterwards would take the last character.
        out.append("\r\n".join(_ERASE_RIGHT + paint(text, colour) for text, colour in lines))
        # On a single row, a line end would scroll away what was just painted.
        out.append(f"\r\n{_ERASE_BELOW}{_SHOW}" if height > 1 else f"\r{_SHOW}")
        self._widths = [text_width(text) for text, _ in lines]
        self._columns = width
        return "".join(out).encode("utf-8", "replace")

    def _rows_above(self, width: int) -> int:
        """Return the screen rows between the top of the last frame and the cursor.

        Most terminals break long lines anew when they become narrower.
        """
        if width >= self._columns:
            return len(self._widths)
        return sum(max(1, -(-cells // width)) for cells in self._widths)


def _size(descriptor: int | None) -> tuple[int, int]:
    if descriptor is None:
        return _FALLBACK_SIZE
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return _FALLBACK_SIZE
    return columns or _FALLBACK_SIZE[0], rows or _FALLBACK_SIZE[1]

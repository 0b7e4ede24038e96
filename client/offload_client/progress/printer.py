"""Turns the changes of a build into numbered lines, one step at a time.

The form is that of `docker build --progress=plain` (BuildKit util/progress/progressui), so that
what people and CI systems already do with its lines keeps working.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_client.progress.clock import NANOSECONDS
from offload_client.progress.loglines import (
    final_lines,
    log_stamp,
    prefix_lines,
    whole_characters,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_client.progress.model import BuildView
    from offload_client.progress.step import Counter, Step

# A shown step keeps the screen at least this long, and longer the larger its part of the news.
_LEAST_TURN_SECONDS = 5.0
# A step whose news waited this long is shown at the next chance.
_LONGEST_WAIT_SECONDS = 10.0
# A counter is printed again after this much progress, or this much time.
_COUNTER_STEP = 0.05
_COUNTER_PAUSE_NS = 5 * NANOSECONDS
# Lines of a failed step that are repeated at the end. BuildKit's printer repeats 10.
TAIL_LINES = 20
_SHORT_NAME_CHARACTERS = 72
# Of a line without an end, such as a progress bar that only goes back, so much is remembered: for
# printing it again after a line of another step, and for the report of a failure.
OPEN_LINE_BYTES = 64 << 10


@dataclass(slots=True)
class Lane:
    """What was printed of one step, and what waits."""

    step: Step
    number: int = 0
    label: bytes = b""
    """The number as printed before each line; empty until the step is first printed."""
    title: str = ""
    """The name as last printed."""
    news: int = 0
    waiting_since: float = 0.0
    open_line: bytearray | None = None
    """Text of a line that has not ended yet, without the label."""
    shown: int = 0
    """Bytes of the open line that stand on the screen's last line."""
    warnings: int = 0
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Amount and time of the last print, by counter."""
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    def rate(self, now: float) -> float:
        """Return news per second."""
        return self.news / max(now - self.waiting_since, 1e-6)


class PlainPrinter:
    """Turns the changes of a view into lines. Not thread-safe."""

    def __init__(self, view: BuildView, *, truncate_names: bool = False) -> None:
        """Print the steps of a view.

        Args:
            view: the state; its news and the steps' logs are consumed.
            truncate_names: cut step names after 72 characters (PROGRESS_NO_TRUNC=0).
        """
        self._view = view
        self._truncate_names = truncate_names
        self._lanes: dict[str, Lane] = {}
        self._waiting: dict[str, Lane] = {}
        self._current: Lane | None = None
        self._numbers = 0
        self._mid_line = False
        self._out: list[bytes] = []

    def render(self, now: float, *, final: bool = False, late_warnings: bool = False) -> bytes:
        """Return what is to be printed now.

        Args:
            now: local monotonic seconds.
            final: print everything that still waits.
            late_warnings: go back to steps that got warnings after their end.
        """
        self._collect(now)
        if late_warnings:
            self._waiting |= {
                key: lane
                for key, lane in self._lanes.items()
                if len(lane.step.warnings) > lane.warnings
            }
        self._print_completed()
        if final:
            self._print_all()
        else:
            self._print_running(now)
        return self._take()

    def settle(self, now: float) -> None:
        """Print all that waits of the steps, which are over; the numbers of later ones go on."""
        self._collect(now)
        self._print_completed()
        self._print_all()
        self._current = None
        self._lanes.clear()

    def _print_all(self) -> None:
        for lane in sorted(self._waiting.values(), key=lambda lane: lane.step.started_ns or 0):
            self._print(lane, final=True)
        for lane in self._lanes.values():
            self._print_held_back(lane)
        self._end_line()

    def interject(self, line: str) -> None:
        """Put a line of the client's own between the others."""
        self._end_line()
        self._out.append(line.encode("utf-8", "replace") + b"\n")

    def tail_of(self, step: Step) -> list[bytes]:
        """Return the last lines of a step as they were printed, without the number."""
        lane = self._lanes.get(step.digest)
        if lane is None:
            return []
        lines = [line.removesuffix(b"\n") for line in lane.tail]
        return [*lines, bytes(lane.open_line)] if lane.open_line else lines

    def _take(self) -> bytes:
        data = b"".join(self._out)
        self._out.clear()
        return data

    def _collect(self, now: float) -> None:
        for key, count in self._view.take_news().items():
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane(self._view.steps[key])
            if not lane.step.intervals and not lane.step.log:
                continue  # a counter of a step that has not started has nowhere to stand
            if lane.news == 0:
                lane.waiting_since = now
            lane.news += count
            self._waiting[key] = lane

    def _print_completed(self) -> None:
        current = self._current
        if current is not None and current.shown and current.step.digest in self._waiting:
            # The line that stands half on the screen may be whole now.
            self._print(current)
        done = [lane for lane in self._waiting.values() if lane.step.completed]
        done.sort(key=lambda lane: (lane is not current, lane.step.completed_ns or 0))
        for lane in done:
            self._print(lane)

    def _print_running(self, now: float) -> None:
        current = self._current
        if current is not None and current.step.digest in self._waiting:
            self._print(current)
            current = self._current
        # Of equally busy steps the one that started last is shown.
        others = list(reversed(self._waiting.values()))
        if current is None:
            if others:
                self._print(max(others, key=lambda lane: lane.rate(now)))
            else:
                self._resume_running(now)
            return
        if not others:
            return
        overdue = [o for o in others if now - o.waiting_since > _LONGEST_WAIT_SECONDS]
        if overdue:
            self._print(min(overdue, key=lambda lane: lane.waiting_since))
            return
        own = current.rate(now)
        share = own / (own + sum(lane.rate(now) for lane in others))
        if now - current.waiting_since > _LEAST_TURN_SECONDS / max(1.0 - share, 1e-6):
            self._print(max(others, key=lambda lane: lane.rate(now)))

    def _resume_running(self, now: float) -> None:
        """Say which step runs when the one that was shown has ended."""
        for step in self._view.shown:
            if step.running:
                lane = self._lanes.get(step.digest)
                if lane is None:
                    lane = self._lanes[step.digest] = Lane(step)
                lane.waiting_since = now
                self._print(lane)
                return

    def _print(self, lane: Lane, *, final: bool = False) -> None:
        self._waiting.pop(lane.step.digest, None)
        self._heading(lane)
        step = lane.step
        counting = self._print_counters(lane)
        if len(step.warnings) > lane.warnings:
            for warning in step.warnings[lane.warnings :]:
                self._line(lane, b"WARN: " + b" ".join(warning.short.splitlines()))
            lane.warnings = len(step.warnings)
        if step.log:
            self._print_log(lane)
        self._current = lane
        # The counters of a step that was stopped never end.
        if step.completed and (final or step.error or not counting):
            self._print_held_back(lane)
            self._end_line()
            lane.open_line = None
            self._print_outcome(lane)
            self._current = None
            lane.news = 0

    def _print_outcome(self, lane: Lane) -> None:
        self._line(lane, _outcome(lane.step).encode("utf-8", "replace"))

    def _heading(self, lane: Lane) -> None:
        title = lane.step.title
        if self._truncate_names and len(title) > _SHORT_NAME_CHARACTERS:
            title = title[:_SHORT_NAME_CHARACTERS] + "..."
        if not lane.label:
            self._numbers += 1
            lane.number = self._numbers
            lane.label = b"#%d " % lane.number
        previous = self._current
        if previous is lane:
            if title != lane.title:
                lane.title = title
                self._line(lane, title.encode("utf-8", "replace"))
            return
        self._end_line()
        if previous is not None:
            previous.news = 0
            self._out.append(previous.label + b"...\n")
        if self._numbers > 1 or lane.title:
            self._out.append(b"\n")
        lane.title = title
        self._line(lane, title.encode("utf-8", "replace"))

    def _line(self, lane: Lane, text: bytes) -> None:
        self._end_line()
        self._out.append(lane.label + text + b"\n")

    def _end_line(self) -> None:
        if self._mid_line:
            self._out.append(b"\n")
            self._mid_line = False
            if self._current is not None:
                # The rest of the line comes later, after the part that was already shown.
                self._current.shown = 0

    def _print_counters(self, lane: Lane) -> bool:
        """Print counters with news; return whether one of them goes on."""
        step = lane.step
        if not step.changed_counters:
            return False
        open_counter = False
        for counter in step.counters.values():
            if counter.id not in step.changed_counters:
                continue
            if not _worth_printing(counter, lane.counters.get(counter.id)):
                continue
            lane.counters[counter.id] = (counter.current, counter.timestamp_ns)
            open_counter = open_counter or counter.completed_ns is None
            self._line(lane, _counter_text(counter).encode("utf-8", "replace"))
        step.changed_counters.clear()
        return open_counter

    def _print_log(self, lane: Lane) -> None:
        step = lane.step
        if lane.open_line is None or not lane.shown:
            self._end_line()
        log = list(step.log)
        step.log.clear()
        self._view.pending_log_bytes -= step.log_bytes
        step.log_bytes = 0
        self._append_log(lane, log)
        self._show_open_line(lane)

    def _show_open_line(self, lane: Lane) -> None:
        """Print what is new of a line that has not ended."""
        if lane.open_line is None:
            return
        visible = whole_characters(lane.open_line)
        if visible > lane.shown:
            if not lane.shown:
                self._out.append(lane.label)
            self._out.append(bytes(lane.open_line[lane.shown : visible]))
            lane.shown = visible
        self._mid_line = lane.shown > 0
        if (excess := lane.shown - OPEN_LINE_BYTES) > 0:
            del lane.open_line[:excess]
            lane.shown -= excess

    def _print_held_back(self, lane: Lane) -> None:
        """Print what was kept as part of a character of which the rest will never come."""
        line = lane.open_line
        if line is None or whole_characters(line) == len(line):
            return
        if lane.shown:
            self._out.append(bytes(line[lane.shown :]))
        else:
            self._end_line()
            self._out.append(lane.label + line)
        lane.shown = len(line)
        self._mid_line = True

    def _append_log(self, lane: Lane, log: Iterable[tuple[float, bytes]]) -> None:
        label, tail, out = lane.label, lane.tail, self._out
        line = lane.open_line
        for offset, piece in log:
            data = piece
            if line is not None:
                end = data.find(b"\n") + 1
                line += data[:end] if end else data
                if not end:
                    continue
                tail.append(bytes(line))
                out.append(bytes(line[lane.shown :]) if lane.shown else label + line)
                lane.shown = 0
                line = None
                self._mid_line = False
                data = data[end:]
            end = data.rfind(b"\n") + 1
            stamp = log_stamp(offset)
            if end:
                # The hot path: thousands of lines may come in one piece.
                whole = data[:end]
                out.append(prefix_lines(label + stamp, whole))
                tail.extend(stamp + text for text in final_lines(whole, TAIL_LINES))
            if end < len(data):
                line = bytearray(stamp + data[end:])
        lane.open_line = line


def _outcome(step: Step) -> str:
    if step.canceled:
        return "CANCELED"
    if step.error:
        return f"ERROR: {step.error}"
    if step.cached:
        return "CACHED"
    return f"DONE {step.done_seconds():.1f}s"


def _worth_printing(counter: Counter, last: tuple[int, int] | None) -> bool:
    if last is None or counter.completed_ns is not None:
        return True
    amount, moment_ns = last
    progress = (counter.current - amount) / counter.total if counter.total > 0 else 0.0
    return progress >= _COUNTER_STEP or counter.timestamp_ns - moment_ns >= _COUNTER_PAUSE_NS


def _counter_text(counter: Counter) -> str:
    text = counter.id
    if amount := counter.amount():
        text += f" {amount}"
    if counter.started_ns is not None:
        end = counter.timestamp_ns if counter.completed_ns is None else counter.completed_ns
        seconds = (end - counter.started_ns) / NANOSECONDS
        if seconds > 0.01:
            text += f" {seconds:.1f}s"
    return text if counter.completed_ns is None else f"{text} done"

from __future__ import annotations

import os
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_client.progress.cells import text_width
from offload_client.progress.display import Display, make_display
from offload_client.progress.model import BuildView
from offload_client.progress.rows import choose_rows, step_rows
from offload_proto.v1.node_service_pb2 import Failure
from tests.unit.client.progress.recorded import Scribe, batches
from tests.unit.client.progress.terminal import Terminal

scribe = Scribe()


def display_on(terminal: Terminal, **environment: str) -> Display:
    return make_display("tty", terminal.stream, {"TERM": "xterm", **environment})


def test_a_recorded_build_ends_with_a_row_per_step() -> None:
    with Terminal(90, 40) as terminal:
        with display_on(terminal) as display:
            for batch in batches("parallel"):
                display.feed(batch)
        lines = terminal.lines()
    assert re.fullmatch(r"\[\+\] Building \d+\.\ds \(13/13\) FINISHED", lines[0])
    assert lines[1] == " => [internal] load build definition from Dockerfile".ljust(85) + "0.0s"
    assert lines[2].startswith(" => => transferring dockerfile: 568B ")
    assert f"{' => [base 2/2] RUN [':<20}" in "\n".join(lines)
    assert " => => sending tarball".ljust(85) + "0.0s" in lines
    assert " 3 warnings found (use --debug to expand):" in lines
    assert sum(line.startswith("[+]") for line in lines) == 1


def test_running_steps_show_their_last_output_and_tick() -> None:
    with Terminal(60, 20) as terminal, display_on(terminal) as display:
        display.feed(scribe.vertex("a", "[1/2] COPY x", start=0, end=1, cached=True))
        display.feed(scribe.vertex("b", "[2/2] RUN make", start=0))
        for number in range(9):
            display.feed(scribe.log("b", b"\x1b[32mline %d\x1b[0m\n" % number))
        lines = terminal.until("line 8")
        assert lines[1] == " => CACHED [1/2] COPY x".ljust(55) + "1.0s"
        assert lines[2].startswith(" => [2/2] RUN make ")
        assert lines[3:9] == [f" => => # line {number}" for number in range(3, 9)]
        first = float(lines[2].split()[-1][:-1])
        time.sleep(0.4)
        later = float(terminal.lines()[2].split()[-1][:-1])
        assert 0.2 < later - first < 2.0


def test_colours_tell_how_steps_ended() -> None:
    with Terminal(60, 20) as terminal, display_on(terminal) as display:
        display.feed(scribe.vertex("a", "good", start=0, end=1))
        display.feed(scribe.vertex("b", "bad", start=0, end=1, error="exit code: 1"))
        display.feed(scribe.vertex("c", "stopped", start=0, end=1, error="context canceled"))
        display.feed(scribe.vertex("d", "going", start=0))
        terminal.until("going")
        colours = [terminal.colour_of(text) for text in ("good", "bad", "stopped", "going")]
        assert colours == ["blue", "red", "brown", "default"]
        assert " => CANCELED stopped" in "\n".join(terminal.lines())
        assert " => ERROR bad" in "\n".join(terminal.lines())


def test_colours_can_be_chosen_and_turned_off() -> None:
    chosen = "run=green:error=1,2,x:nonsense"
    with Terminal() as terminal, display_on(terminal, BUILDKIT_COLORS=chosen) as display:
        display.feed(scribe.vertex("a", "good", start=0, end=1))
        terminal.until("good")
        assert terminal.colour_of("good") == "green"
    with Terminal() as terminal:
        with display_on(terminal, NO_COLOR="1") as display:
            display.feed(scribe.vertex("a", "good", start=0, end=1))
            display.feed(scribe.vertex("b", "loud", start=0))
            display.feed(scribe.log("b", b"output\n"))
            display.notice("warning", "careful")
            display.feed(scribe.warning("b", "mind"))
            terminal.until("good")
        terminal.settle()
        assert not re.search(rb"\x1b\[[\d;]*m", terminal.received)


def test_the_number_of_output_lines_can_be_chosen() -> None:
    with Terminal() as terminal, display_on(terminal, BUILDKIT_TTY_LOG_LINES="2") as display:
        display.feed(scribe.vertex("a", start=0))
        display.feed(scribe.log("a", b"1\n2\n3\n4\n"))
        lines = terminal.until("# 4")
        assert [line for line in lines if "#" in line] == [" => => # 3", " => => # 4"]


def test_notices_stay_above_the_steps() -> None:
    with Terminal(40, 12) as terminal:
        print("$ offload-build .", file=terminal.stream, flush=True)
        with display_on(terminal) as display:
            display.feed(scribe.vertex("a", "first", start=0, end=1))
            terminal.until("first")
            display.notice("warning", "the cache is away")
            display.notice("info", "going on")
            terminal.until("going on")
        lines = terminal.lines()
    assert lines[:3] == ["$ offload-build .", "WARNING: the cache is away", "going on"]
    assert lines[3].startswith("[+] Building ")
    assert len(lines) == 5


def test_more_steps_than_rows_keep_the_running_ones_in_sight() -> None:
    with Terminal(50, 8) as terminal:
        with display_on(terminal) as display:
            for number in range(30):
                end = None if number in {3, 29} else 1
                display.feed(scribe.vertex(f"v{number}", f"step {number}", start=0, end=end))
            lines = terminal.until("step 29")
            assert [line.split()[2] for line in lines[1:7]] == ["3", "25", "26", "27", "28", "29"]
            assert not terminal.screen.history.top
        everything = [line for line in terminal.everything() if line]
    assert sum(line.startswith(" => step") for line in everything) == 30


def test_the_cursor_comes_back_after_an_interrupt() -> None:
    with Terminal() as terminal:
        with pytest.raises(KeyboardInterrupt), display_on(terminal) as display:
            display.feed(scribe.vertex("a", "first", start=0))
            terminal.until("first")
            raise KeyboardInterrupt
        assert terminal.cursor_visible
        assert terminal.received.rstrip().endswith(b"\x1b[?25h")
        shown = bytes(terminal.received)
        assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h")
        assert terminal.screen.cursor.x == 0


def test_a_failed_step_is_reported_with_all_its_output() -> None:
    output = b"".join(b"line %d\n" % number for number in range(50))
    with Terminal(80, 24) as terminal:
        display = display_on(terminal)
        display.feed(scribe.vertex("a", "[2/3] RUN make", start=0))
        display.feed(scribe.log("a", output, 1.5))
        display.feed(scribe.vertex("a", "[2/3] RUN make", start=0, end=2, error="exit code: 2"))
        failure = Failure(
            kind=Failure.KIND_BUILD,
            message="exit code: 2",
            source_filename="Dockerfile",
            source_data=b"FROM x\nRUN make\n",
        )
        failure.source_ranges.add(start_line=2, end_line=2)
        display.finish(failure)
        lines = terminal.everything()
    start = lines.index(" > [2/3] RUN make:")
    assert lines[start - 1] == "------"
    assert lines[start + 1 : start + 51] == [f"1.500 line {number}" for number in range(50)]
    assert lines[start + 51 : start + 53] == ["------", "Dockerfile:2"]
    assert "   2 | >>> RUN make" in lines
    assert lines[-1] == "ERROR: failed to build: failed to solve: exit code: 2"


def test_a_smaller_and_a_larger_window_are_respected() -> None:
    with Terminal(100, 30) as terminal, display_on(terminal) as display:
        display.feed(scribe.vertex("a", "a" * 300, start=0))
        for number in range(20):
            display.feed(scribe.vertex(f"v{number}", f"step {number}", start=0, end=1))
        terminal.until("step 19")
        for columns, rows in ((30, 10), (120, 40), (7, 4), (1, 1), (80, 24)):
            terminal.resize(columns, rows)
            before = len(terminal.received)
            while bytes(terminal.received[before:]).count(b"\x1b[?25h") < 3:
                time.sleep(0.02)
            frame = terminal.received[before:].split(b"\x1b[?25l")[-2].decode()
            rows_painted = [re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", x) for x in frame.split("\r\n")]
            assert all(text_width(row.strip("\r")) <= columns for row in rows_painted)
            assert len(rows_painted) <= rows
        assert terminal.lines()[-1].startswith(" => step 19")


def test_a_terminal_that_does_not_read_drops_frames_and_delays_nobody() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as reader, os.fdopen(theirs, "wb") as stream:
        display = make_display("tty", stream, {})
        began = time.monotonic()
        display.feed(scribe.vertex("a", start=0))
        for number in range(3000):
            display.feed(scribe.vertex(f"v{number}", "x" * 80, start=0, end=1))
            if number % 100 == 0:
                time.sleep(0.02)
        assert time.monotonic() - began < 5.0
        with pytest.raises(ZeroDivisionError), display:
            raise ZeroDivisionError
        assert time.monotonic() - began < 9.0
        assert reader.read(1 << 16).startswith(b"\x1b[?25l")


_name = st.text(max_size=80)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(-1, 60),
    st.lists(st.tuples(_name, st.sampled_from(["run", "done", "error"]), _name), max_size=12),
)
def test_no_row_is_wider_than_the_terminal_and_no_frame_higher(
    width: int, limit: int, steps: list[tuple[str, str, str]]
) -> None:
    view = BuildView(0.0)
    for number, (name, state, text) in enumerate(steps):
        key = f"v{number}"
        end, error = (None if state == "run" else 99_999.0), ("x" if state == "error" else "")
        view.apply(scribe.vertex(key, name, start=0, end=end, error=error), 0.0)
        view.apply(scribe.counter(key, text, 10**12, 10**15), 0.0)
        view.apply(scribe.log(key, text.encode()), 0.0)
        view.apply(scribe.warning(key, text), 0.0)
    rows = choose_rows(view, 12345.6, limit, 6)
    assert len(rows) <= max(limit, 0)
    every = [row for step in view.shown for row in step_rows(step, view, 1.0)]
    for row in rows + every:
        text = row.text(width)
        assert text_width(text) <= width
        assert not any(ord(character) < 32 for character in text)

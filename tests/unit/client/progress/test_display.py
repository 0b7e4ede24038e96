from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from offload_client.progress.display import MODES, make_display
from offload_client.progress.plain import PlainDisplay
from offload_client.progress.quiet import QuietDisplay
from offload_client.progress.rawjson import RawJsonDisplay
from offload_client.progress.tty import TtyDisplay
from offload_core.errors import UsageError
from offload_proto.v1.node_service_pb2 import Failure
from tests.unit.client.progress.recorded import Scribe, batches
from tests.unit.client.progress.terminal import Terminal

scribe = Scribe()


@pytest.mark.parametrize(
    ("mode", "environment", "terminal", "expected"),
    [
        ("auto", {}, True, TtyDisplay),
        ("auto", {}, False, PlainDisplay),
        ("auto", {"TERM": "dumb"}, True, PlainDisplay),
        ("auto", {"BUILDKIT_PROGRESS": "plain"}, True, PlainDisplay),
        ("auto", {"BUILDKIT_PROGRESS": "rawjson"}, False, RawJsonDisplay),
        ("auto", {"BUILDKIT_PROGRESS": "plain", "OFFLOAD_PROGRESS": "quiet"}, True, QuietDisplay),
        ("auto", {"BUILDKIT_PROGRESS": "plain", "OFFLOAD_PROGRESS": "auto"}, True, TtyDisplay),
        ("auto", {"BUILDKIT_PROGRESS": "tty"}, False, PlainDisplay),
        ("plain", {"BUILDKIT_PROGRESS": "tty"}, True, PlainDisplay),
        ("tty", {"TERM": "dumb"}, True, TtyDisplay),
        ("none", {}, True, QuietDisplay),
        ("quiet", {}, False, QuietDisplay),
        ("rawjson", {}, True, RawJsonDisplay),
    ],
)
def test_the_display_that_is_chosen(
    mode: str, environment: dict[str, str], terminal: bool, expected: type
) -> None:
    with Terminal() as pseudo:
        stream = pseudo.stream if terminal else io.BytesIO()
        assert isinstance(make_display(mode, stream, environment), expected)


def test_wrong_modes_are_refused() -> None:
    with pytest.raises(UsageError, match='--progress is "fancy"; write one of auto, none'):
        make_display("fancy", io.BytesIO(), {})
    with pytest.raises(UsageError, match='BUILDKIT_PROGRESS is "fancy"'):
        make_display("auto", io.BytesIO(), {"BUILDKIT_PROGRESS": "fancy"})
    with pytest.raises(UsageError, match="needs a terminal"):
        make_display("tty", io.BytesIO(), {})


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "tty"])
def test_nothing_is_printed_of_nothing(mode: str) -> None:
    stream = io.BytesIO()
    with make_display(mode, stream, {}):
        pass
    assert stream.getvalue() == b""


def test_plain_is_printed_while_the_build_runs(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream, make_display("plain", stream, {}) as display:
        display.feed(scribe.vertex("a", "[1/1] RUN x", start=0))
        display.feed(scribe.log("a", b"hello\n", 0.5))
        deadline = time.monotonic() + 5
        while "hello" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.read_text() == "#1 [1/1] RUN x\n#1 0.500 hello\n"


def test_text_and_binary_streams_and_descriptors_get_the_same(tmp_path: Path) -> None:
    text, binary, path = io.StringIO(), io.BytesIO(), tmp_path / "log"
    with path.open("w") as file:
        for stream in (text, binary, file):
            with make_display("plain", stream, {}) as display:
                for batch in batches("failing"):
                    display.feed(batch)
    # All three are fed at full speed; only what is coalesced may differ.
    ends = [out[out.index("#6 ") :] for out in (text.getvalue(), path.read_text())]
    assert ends[0] == ends[1]
    assert binary.getvalue().decode()[-len(ends[0]) :] == ends[0]


def test_what_the_stream_held_back_comes_first(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as stream:
        stream.write("before\n")
        with make_display("plain", stream, {}) as display:
            display.notice("info", "after")
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_local_steps_stand_among_the_others() -> None:
    stream = io.BytesIO()
    with make_display("plain", stream, {}) as display:
        waiting = display.local_step("[offload] waiting for a node, queue position 2")
        time.sleep(0.15)
        waiting.rename("[offload] waiting for a node, queue position 1")
        time.sleep(0.15)
        waiting.done()
        for batch in batches("failing")[:7]:
            display.feed(batch)
        with display.local_step("[offload] loading image") as step:
            step.progress("loading", 0, 2_000_000)
            step.progress("loading", 1_000_000, 2_000_000)
            step.log("layer already there")
            step.progress("loading", 2_000_000, 2_000_000)
            time.sleep(0.12)
    text = stream.getvalue().decode()
    assert re.match(
        r"#1 \[offload\] waiting for a node, queue position 2\n"
        r"#1 \[offload\] waiting for a node, queue position 1\n"
        r"#1 DONE 0\.\ds\n\n#2 \[internal\] load build definition from Dockerfile\n",
        text,
    )
    assert re.search(
        r"#\d \[offload\] loading image\n(#\d loading 0B / 2\.00MB\n)?"
        r"(#\d loading 2\.00MB / 2\.00MB 0\.1s done\n)?"
        r"#\d 0\.\d{3} layer already there\n"
        r"(#\d loading 2\.00MB / 2\.00MB 0\.1s done\n)?#\d DONE 0\.1s\n$",
        text,
    )


def test_counters_of_local_steps_are_told_seldom_and_at_their_end() -> None:
    stream = io.BytesIO()
    with make_display("rawjson", stream, {}) as display:
        step = display.local_step("[offload] transferring build context")
        for amount in range(100_000):
            step.progress("transferring context:", amount)
        step.progress_done("transferring context:")
        step.done()
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) < 30
    assert b'"current":99999' in lines[-2]


def test_a_local_step_ends_with_its_block() -> None:
    stream = io.BytesIO()
    display = make_display("plain", stream, {})
    with pytest.raises(ValueError, match="no engine"), display.local_step("[offload] load"):
        raise ValueError("no engine")
    with pytest.raises(KeyboardInterrupt), display.local_step("[offload] wait"):
        raise KeyboardInterrupt
    display.finish()
    text = stream.getvalue().decode()
    assert "#1 ERROR: no engine\n" in text
    assert "#2 CANCELED\n" in text
    assert "------" not in text


def test_quiet_says_nothing_unless_the_build_fails() -> None:
    for failure in (None, Failure(kind=Failure.KIND_BUILD, message="exit code: 7")):
        stream = io.BytesIO()
        display = make_display("quiet", stream, {})
        for batch in batches("failing"):
            display.feed(batch)
        display.notice("warning", "the cache is away")
        display.finish(failure)
        text = stream.getvalue().decode()
        if failure is None:
            assert text == ""
        else:
            lines = text.splitlines()
            assert lines[0] == "------"
            assert lines[1].startswith(" > [3/4] RUN for i in")
            assert lines[-3:] == [
                "line 14",
                "------",
                "ERROR: failed to build: failed to solve: exit code: 7",
            ]
            assert len(lines) == 19


def test_warnings_are_listed_at_the_end_of_a_build_that_worked() -> None:
    for failure in (None, Failure(message="no")):
        stream = io.BytesIO()
        display = make_display("plain", stream, {}, expand_warnings=True)
        display.feed(scribe.vertex("a", start=0, end=1))
        display.feed(scribe.warning("a", "mind the gap", url="https://example.org"))
        display.finish(failure)
        text = stream.getvalue().decode()
        listed = "\n 1 warning found:\n - mind the gap\nMore info: https://example.org\n"
        assert (listed in text) == (failure is None)
        assert "mind the gap" in text


def test_finishing_twice_and_feeding_afterwards_do_nothing() -> None:
    stream = io.BytesIO()
    with make_display("plain", stream, {}) as display:
        display.feed(scribe.vertex("a", start=0, end=1))
        display.finish()
        before = stream.getvalue()
        display.feed(scribe.vertex("b", start=0, end=1))
        display.notice("info", "late")
        display.finish(Failure(message="late"))
    assert stream.getvalue() == before == b"#1 step a\n#1 DONE 1.0s\n"


def test_a_reader_that_went_away_does_not_end_the_build() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:
        os.close(reading)
        with make_display("plain", stream, {}) as display:
            for batch in batches("parallel"):
                display.feed(batch)


def test_a_pipe_that_is_not_read_blocks_neither_the_feed_nor_loses_lines() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as a program sharing the terminal may have done
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as stream:
        display = make_display("plain", stream, {})
        display.feed(scribe.vertex("a", start=0))
        began = time.monotonic()
        for number in range(1000):
            display.feed(scribe.log("a", b"line %d %s\n" % (number, b"x" * 1000)))
        assert time.monotonic() - began < 1.0
        text = bytearray()
        collector = threading.Thread(target=lambda: text.extend(reader.read()))
        collector.start()
        display.finish()
        stream.close()
        collector.join()
    assert [int(n) for n in re.findall(rb"0\.000 line (\d+) ", text)] == list(range(1000))


def test_an_interrupted_command_does_not_wait_for_a_reader_that_stopped(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as reader:
        began = time.monotonic()
        with (
            os.fdopen(writing, "wb") as stream,
            pytest.raises(KeyboardInterrupt),
            make_display("plain", stream, {}) as display,
        ):
            display.feed(scribe.vertex("a", start=0))
            display.feed(scribe.log("a", b"x" * 200_000 + b"\n"))
            raise KeyboardInterrupt
        assert time.monotonic() - began < 5.0
        with (tmp_path / "other").open("wb") as other:
            assert other.fileno() == writing
            # The reader goes on, and what was given up does not turn up in the other file.
            while reader.read(1 << 16):
                pass
    assert (tmp_path / "other").read_bytes() == b""


def test_all_lines_of_a_talkative_build_arrive_in_order() -> None:
    stream = io.BytesIO()
    count = 50_000
    with make_display("plain", stream, {}) as display:
        display.feed(scribe.vertex("a", start=0))
        for start in range(0, count, 500):
            batch = scribe.batch()
            for number in range(start, start + 500):
                batch.logs.add(vertex="a", stream=1, data=b"line %d\n" % number)
            display.feed(batch)
    numbers = [int(n) for n in re.findall(rb" line (\d+)\n", stream.getvalue())]
    assert numbers == list(range(count))


def test_plain_imports_nothing_heavy() -> None:
    program = (
        "import sys; import offload_proto.v1.events_pb2; before = set(sys.modules);"
        "from offload_client.progress.display import make_display; import io;"
        "make_display('plain', io.BytesIO(), {}).finish();"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    heavy = {"asyncio", "grpc", "rich", "click", "structlog", "json", "unicodedata"}
    assert not heavy & set(done.stdout.split())

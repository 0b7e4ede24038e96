from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_client.progress.excerpt import step_excerpt
from offload_client.progress.model import BuildView
from offload_client.progress.printer import PlainPrinter
from tests.unit.client.progress.recorded import Scribe, batches, plain

# BuildKit throttles counters by their id alone, so that the first "transferring context:" of a
# second step is taken for progress of the first step's. We throttle per step and print it.
_FIRST_OF_A_COUNTER = re.compile(r"(#\d+ transferring context:.*(?<!done)\n)")


class Printed:
    """A printer driven by hand, with a clock of its own."""

    def __init__(self, **options: bool) -> None:
        self.now = 0.0
        self.view = BuildView(0.0)
        self.printer = PlainPrinter(self.view, **options)
        self.text = b""

    def feed(self, *news: object, seconds: float = 0.2) -> str:
        for batch in news:
            self.view.apply(batch, self.now)  # type: ignore[arg-type]
        return self.tick(seconds)

    def tick(self, seconds: float = 0.2) -> str:
        new = self.printer.render(self.now)
        self.text += new
        self.now += seconds
        return new.decode("utf-8", "replace")

    def end(self) -> str:
        self.view.reveal_all()
        self.text += self.printer.render(self.now, final=True)
        return self.text.decode()


@pytest.mark.parametrize("name", ["parallel", "failing", "link"])
def test_recorded_build_reads_as_from_buildkits_own_printer(name: str) -> None:
    printed = Printed()
    for batch in batches(name):
        printed.feed(batch, seconds=0.15)
        printed.tick(0.05)
    text = printed.end()
    for step in printed.view.shown:
        if step.failed:
            # BuildKit repeats 10 lines, we 20.
            text += step_excerpt(step, printed.printer.tail_of(step)[-10:]).decode()
    expected = plain(name)
    extra = _FIRST_OF_A_COUNTER.search(text, text.index("#3 "))
    assert extra is not None
    assert text.replace(extra[0], "", 1) == expected


def test_steps_that_all_come_from_the_cache_are_printed_one_after_the_other() -> None:
    printed = Printed()
    printed.feed(*batches("cached"))
    text = printed.end()
    assert len(re.findall(r"^#\d+ CACHED$", text, re.MULTILINE)) == 9
    assert [int(n) for n in re.findall(r"^#(\d+) \[", text, re.MULTILINE)] == list(range(1, 13))


def test_a_partial_line_is_shown_at_once_and_continued() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", "[1/2] RUN a", start=0))
    assert printed.feed(scribe.log("a", b"first, ", 1)) == "#1 1.000 first, "
    assert printed.feed(scribe.log("a", b"second\nthird\n", 2)) == "second\n#1 2.000 third\n"


def test_a_partial_line_that_was_interrupted_is_printed_again_whole() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0), scribe.vertex("b", start=0))
    printed.feed(scribe.log("b", b"be", 1))
    printed.feed(scribe.vertex("a", start=0, end=2))
    printed.feed(scribe.log("b", b"fore\n", 3), scribe.vertex("b", start=0, end=3))
    text = printed.end()
    assert "#1 1.000 be\n#1 ...\n\n#2 step a\n#2 DONE 2.0s\n" in text
    assert text.endswith("\n\n#1 step b\n#1 1.000 before\n#1 DONE 3.0s\n")


def test_a_line_without_an_end_is_kept_in_part_and_shown_as_a_whole() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", "[1/2] RUN a", start=0))
    bars = [b"%9d\r" % number * 1000 for number in range(100)]
    for bar in bars:
        printed.feed(scribe.log("a", bar, 1))
        (kept,) = printed.printer.tail_of(printed.view.steps["a"])
        assert len(kept) <= 64 << 10
    printed.feed(scribe.log("a", b"done\n", 2))
    assert (b"".join(bars) + b"done\n").decode() in printed.end()


def test_a_character_that_comes_in_two_pieces_is_never_cut() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0))
    data = "grüße 語 🙂\n".encode()
    for index in range(len(data)):
        printed.feed(scribe.log("a", data[index : index + 1], 1)).encode()
        printed.text.decode()  # would raise
    assert "#1 1.000 grüße 語 🙂\n" in printed.end()


def test_bytes_that_are_no_text_are_passed_on() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0))
    for data in (b"\xff\xfe", b"\xc3", b"x\r", b"50%\r100%\n", b"\xf0\x9f"):
        printed.view.apply(scribe.log("a", data), 0.0)
        printed.text += printed.printer.render(printed.now)
    printed.text += printed.printer.render(printed.now, final=True)
    assert b"0.000 \xff\xfe\xc3x\r50%\r100%\n" in printed.text
    assert b"0.000 \xf0\x9f" in b"".join(printed.printer.tail_of(printed.view.steps["a"]))


def test_a_line_that_became_whole_is_ended_before_another_step_is_shown() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0), scribe.log("a", b"half", 1))
    printed.feed(scribe.log("a", b" and half\n", 2), scribe.vertex("b", start=0, end=1))
    expected = "#1 step a\n#1 1.000 half and half\n#1 ...\n\n#2 step b\n#2 DONE 1.0s\n"
    assert printed.end() == expected + "\n#1 step a\n"


def test_times_before_lines_keep_their_width() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0))
    for moment in (1.23456, 12.3456, 123.456):
        printed.feed(scribe.log("a", b"x\n", moment))
    assert printed.end().endswith("#1 1.235 x\n#1 12.35 x\n#1 123.5 x\n")


def test_errors_and_cancellation_end_a_step() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0, end=1, error="exit code: 7"))
    printed.feed(scribe.vertex("b", start=0, end=1, error="solve: context canceled"))
    text = printed.end()
    assert "#1 ERROR: exit code: 7\n" in text
    assert "#2 CANCELED\n" in text


def test_a_step_that_ran_twice_counts_only_the_time_it_ran() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0))
    printed.feed(scribe.vertex("a", start=0, end=1))
    printed.feed(scribe.vertex("a", start=10))
    printed.feed(scribe.vertex("a", start=10, end=12))
    assert printed.end().endswith("#1 DONE 3.0s\n")
    step = printed.view.steps["a"]
    assert step.completed_ns is not None
    assert step.started_ns is not None
    assert (step.completed_ns - step.started_ns) / 1e9 == 12.0


def test_counters_are_printed_when_they_have_moved() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0))
    for percent in range(101):
        news = scribe.counter("a", "layer", percent * 10_000, 1_000_000, moment=percent / 100)
        printed.feed(news)
    printed.feed(scribe.counter("a", "layer", 1_000_000, 1_000_000, moment=1.1, end=1.1))
    lines = [line for line in printed.end().splitlines() if "layer" in line]
    assert lines[0] == "#1 layer 0B / 1.00MB"
    assert lines[1] == "#1 layer 50.00kB / 1.00MB 0.1s"
    assert lines[-1] == "#1 layer 1.00MB / 1.00MB 1.1s done"
    assert len(lines) == 22


def test_a_busy_step_gives_way_after_a_while_and_no_line_is_lost() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0), scribe.vertex("b", start=0))
    turns = 0
    for second in range(60):
        new = printed.feed(
            scribe.log("a", b"from a %d\n" % second, second),
            scribe.log("b", b"from b %d\n" % second, second),
            seconds=1.0,
        )
        turns += new.count(" ...\n")
    text = printed.end()
    assert 2 <= turns <= 12
    for second in range(60):
        assert f"from a {second}\n" in text
        assert f"from b {second}\n" in text


def test_a_quiet_step_is_not_starved_by_a_loud_one() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("loud", start=0))
    printed.feed(scribe.vertex("quiet", start=0), scribe.log("quiet", b"hello\n", 0.1))
    heard = 0.0
    while "hello" not in printed.text.decode():
        printed.feed(*[scribe.log("loud", b"noise\n", printed.now) for _ in range(100)])
        heard = printed.now
        assert heard < 20
    assert heard > 4


def test_a_notice_stands_on_its_own_line() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0), scribe.log("a", b"half", 1))
    printed.printer.interject("WARNING: the cache is away")
    printed.feed(scribe.log("a", b" done\n", 2))
    assert printed.end().endswith("#1 1.000 half\nWARNING: the cache is away\n#1 1.000 half done\n")


def test_a_new_name_of_a_running_step_is_printed() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", "[offload] waiting for a node, queue position 2", start=0))
    new = printed.feed(
        scribe.vertex("a", "[offload] waiting for a node, queue position 1", start=0)
    )
    assert new == "#1 [offload] waiting for a node, queue position 1\n"


def test_output_of_a_step_that_was_never_announced_is_printed() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.log("sha256:unknown", b"hello\n"))
    assert printed.end() == "#1 sha256:unknown\n#1 0.000 hello\n"


def test_a_hidden_group_is_shown_when_it_prints() -> None:
    scribe, printed = Scribe(), Printed()
    group = {"progress_group": "g", "progress_group_name": "merging", "progress_group_weak": True}
    printed.feed(scribe.vertex("a", start=0, **group))
    assert printed.text == b""
    printed.feed(scribe.log("a", b"hello\n", 1))
    assert printed.end() == "#1 merging\n#1 1.000 hello\n"


def test_late_warnings_are_printed_when_no_list_follows() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0, end=1))
    assert printed.feed(scribe.warning("a", "do not")) == ""
    text = printed.printer.render(printed.now, final=True, late_warnings=True).decode()
    assert text == "\n#1 step a\n#1 WARN: do not\n#1 DONE 1.0s\n"


def test_long_names_are_cut_only_when_asked() -> None:
    scribe = Scribe()
    for cut in (False, True):
        printed = Printed(truncate_names=cut)
        printed.feed(scribe.vertex("a", "x" * 100, start=0))
        assert printed.end() == "#1 " + ("x" * 72 + "..." if cut else "x" * 100) + "\n"


_piece = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"line\n", b"\n", b"a\rb\n", "ü".encode()[:1], "ü\n".encode()[1:], b"\r\n"]),
)
_event = st.tuples(
    st.sampled_from(["log", "log", "log", "interrupt", "render", "wait"]),
    st.sampled_from(["a", "b", "c"]),
    _piece,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_event, max_size=60))
def test_no_byte_of_any_step_is_lost_whatever_the_order(
    events: list[tuple[str, str, bytes]],
) -> None:
    scribe, printed = Scribe(), Printed()
    written = {"a": b"", "b": b"", "c": b""}
    for digest in written:
        printed.view.apply(scribe.vertex(digest, digest, start=0), printed.now)
    for number, (kind, digest, data) in enumerate(events):
        match kind:
            case "log":
                printed.view.apply(scribe.log(digest, data), printed.now)
                written[digest] += data
            case "interrupt":
                printed.view.apply(scribe.vertex(f"i{number}", start=0, end=1), printed.now)
            case _:
                printed.text += printed.printer.render(printed.now)
                printed.now += 6.0 if kind == "wait" else 0.1
    for digest in written:
        printed.view.apply(scribe.vertex(digest, digest, start=0, end=1), printed.now)
    printed.text += printed.printer.render(printed.now, final=True)
    assert printed.text.endswith(b" DONE 1.0s\n")
    for digest, data in written.items():
        head = re.search(rb"^(#\d+ )%s$" % digest.encode(), printed.text, re.MULTILINE)
        assert head is not None
        stamp = head[1] + b"0.000 "
        lines = [x.removeprefix(stamp) for x in printed.text.split(b"\n") if x.startswith(stamp)]
        expected = data.removesuffix(b"\n").split(b"\n") if data else []
        last = b""
        for line in lines:
            if expected and line == expected[0]:
                last = expected.pop(0)
            else:
                # The begin of a line that was interrupted here and stands whole further below;
                # the begin may be all of it but the newline.
                assert any(whole.startswith(line) for whole in (*expected[:1], last))
        assert not expected


@given(
    data=st.lists(st.sampled_from([b"one\n", b"\n", b"tw\r\no", b"50%\r99%", b"\xff\xe2", b"x"])),
    cuts=st.lists(st.integers(0, 40)),
)
def test_output_reads_the_same_in_whatever_pieces_it_comes(
    data: list[bytes], cuts: list[int]
) -> None:
    whole = b"".join(data)
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[start:end] for start, end in pairwise(edges)]
    texts = []
    for parts in ([whole] if whole else [], pieces):
        scribe, printed = Scribe(), Printed()
        printed.feed(scribe.vertex("a", start=0))
        for part in parts:
            printed.feed(scribe.log("a", part, 1.5))
        printed.feed(scribe.vertex("a", start=0, end=2))
        printed.view.reveal_all()
        printed.text += printed.printer.render(printed.now, final=True)
        texts.append(printed.text)
    assert texts[0] == texts[1]
    lines = [line for line in whole.split(b"\n") if line] if whole else []
    for line in lines:
        assert line in texts[0]


def test_the_last_20_lines_are_repeated_however_they_came() -> None:
    scribe, printed = Scribe(), Printed()
    printed.feed(scribe.vertex("a", start=0))
    printed.feed(scribe.log("a", b"".join(b"%d\n" % number for number in range(1000)), 1))
    printed.feed(scribe.log("a", b"1000\n", 1), scribe.log("a", b"1001\n1002", 1))
    step = printed.view.steps["a"]
    tail = printed.printer.tail_of(step)
    assert tail == [b"1.000 %d" % number for number in range(982, 1003)]

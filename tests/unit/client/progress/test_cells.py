from __future__ import annotations

import pytest
import wcwidth
from hypothesis import given
from hypothesis import strategies as st

from offload_client.progress.cells import fit, last_lines, printable, text_width, visible_line
from offload_client.progress.loglines import split_lines, stamped_lines


@given(st.text(), st.integers(0, 60))
def test_a_cut_text_never_takes_more_cells_than_there_are(text: str, width: int) -> None:
    cut = fit(printable(text), width)
    assert text_width(cut) <= width
    assert max(wcwidth.wcswidth(cut), 0) <= width
    assert printable(text).startswith(cut)


@given(st.text())
def test_printable_text_has_nothing_that_moves_the_cursor(text: str) -> None:
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in printable(text))


@pytest.mark.parametrize(
    ("text", "width"),
    [("abc", 3), ("grüße", 5), ("語", 2), ("e\u0301", 1), ("🙂", 2), ("\u200b", 0)],
)
def test_width_of_a_text(text: str, width: int) -> None:
    assert text_width(text) == width


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"plain", "plain"),
        (b"10%\r50%\r100%", "100%"),
        (b"10%\r50%\r", "50%"),
        (b"dos\r\n", "dos"),
        (b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07text", "red text"),
        (b"\x1b[2K\x1b[1Gprogress", "progress"),
        (b"a\tb", "a       b"),
        (b"\x07bell\x08", "bell"),
        (b"\xffraw", "\ufffdraw"),
        ("\u202eevil".encode(), "evil"),
    ],
)
def test_a_line_as_a_terminal_would_leave_it(line: bytes, shown: str) -> None:
    assert visible_line(line) == shown


def test_last_lines_are_those_that_are_not_blank() -> None:
    chunks = [b"one\ntwo\n", b"\n\nthr", b"ee\nfour", b"\n\n"]
    assert last_lines(reversed(chunks), 3) == ["two", "three", "four"]
    assert last_lines(reversed(chunks), 0) == []


def test_last_lines_do_not_read_a_long_log_to_its_begin() -> None:
    def chunks():
        for number in range(100):
            assert number < 50
            yield b"line %d\n" % number

    assert last_lines(chunks(), 6) == [f"line {n}" for n in (5, 4, 3, 2, 1, 0)]


def test_last_lines_of_an_endless_line_are_bounded() -> None:
    (line,) = last_lines([b"x" * 1_000_000], 6)
    assert len(line) == 4096


@given(st.binary())
def test_lines_are_split_after_newlines_only(data: bytes) -> None:
    pieces = split_lines(data)
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert all(b"\n" not in piece[:-1] for piece in pieces)


@given(st.lists(st.binary(min_size=1, max_size=8)))
def test_stamped_lines_hold_all_output(pieces: list[bytes]) -> None:
    lines = stamped_lines([(1.0, piece) for piece in pieces])
    whole = b"".join(pieces)
    expected = whole.removesuffix(b"\n").split(b"\n") if whole else []
    assert lines == [b"1.000 " + line for line in expected]

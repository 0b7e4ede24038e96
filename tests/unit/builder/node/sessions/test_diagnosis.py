"""What is taken out of an engine's log before anybody sees it."""

from __future__ import annotations

import time

import pytest

from offload_builder.node.sessions.diagnosis import MAX_LINE, cleaned


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ('msg="a" error="denied: \\"x\\" y" id=abc', 'msg="a" error=... id=...'),
        (f'msg="a" {"k" * 100}=secret', f'msg="a" {"k" * 100}=...'),
        ('msg="a" error="secret that does not end', 'msg="a" error=...'),
        ('msg="pull of corp.example:5000/team/app:v1 fails"', 'msg="pull of ... fails"'),
        ('msg="no \\"web\\" and \'db\'"', 'msg="no ... and ..."'),
    ],
)
def test_what_members_put_in_is_taken_out(line: str, left: str) -> None:
    assert cleaned(line) == left


@pytest.mark.parametrize("before", ['error="', 'msg="a \\"', "msg=\"a '", 'msg="a `'])
def test_a_long_line_is_cut_and_shows_no_half_of_what_is_taken_out(before: str) -> None:
    found = cleaned(f"{before}{'word ' * 400} secret {'b' * MAX_LINE}")
    assert found.startswith(before.partition("=")[0])
    assert found.endswith("... [cut]")
    assert "word" not in found


@pytest.mark.parametrize("unit", ["a.", "a-", "a=", 'a="', "a/", "a:1", "'", '\\"', "'`", "a "])
def test_a_line_that_patterns_find_hard_takes_no_time(unit: str) -> None:
    began = time.process_time()
    cleaned(unit * (64 << 10))
    # A time of this process alone, and far above what it takes.
    assert time.process_time() - began < 1.0

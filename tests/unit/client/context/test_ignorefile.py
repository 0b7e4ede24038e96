"""Which ignore file counts, and what is said about a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_client.context.ignorefile import find_ignore_rules, parse_ignore_file
from offload_core.errors import ContextError
from offload_core.patterns import PatternMatcher


def test_ignore_file_of_the_dockerfile_wins(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("general")
    (tmp_path / "docker").mkdir()
    dockerfile = tmp_path / "docker" / "web.Dockerfile"
    assert find_ignore_rules(tmp_path, dockerfile).patterns == ["general"]
    own = tmp_path / "docker" / "web.Dockerfile.dockerignore"
    own.write_text("special\n")
    rules = find_ignore_rules(tmp_path, dockerfile)
    assert rules.patterns == ["special"]
    assert rules.source == own


def test_empty_ignore_file_of_the_dockerfile_still_wins(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").write_text("general")
    (tmp_path / "Dockerfile.dockerignore").write_text("")
    assert find_ignore_rules(tmp_path, tmp_path / "Dockerfile").patterns == []


def test_no_ignore_file_means_no_rules(tmp_path: Path) -> None:
    rules = find_ignore_rules(tmp_path, tmp_path / "Dockerfile")
    assert (rules.patterns, rules.source) == ([], None)


def test_unreadable_ignore_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / ".dockerignore").mkdir()
    with pytest.raises(ContextError, match=r"\.dockerignore"):
        find_ignore_rules(tmp_path, tmp_path / "Dockerfile")


def test_line_that_go_refuses_is_an_error_with_its_number() -> None:
    with pytest.raises(ContextError, match=r"line 2 of \.dockerignore is too long"):
        parse_ignore_file(b"a\n" + b"b" * 70_000)


def test_exception_without_a_name_is_an_error() -> None:
    with pytest.raises(ContextError, match='"!" names nothing'):
        PatternMatcher(parse_ignore_file(b"!\n"))


def test_backwards_range_is_an_error_when_it_is_tried() -> None:
    matcher = PatternMatcher(["[z-a]"])
    with pytest.raises(ContextError, match=r'"\[z-a\]" is malformed: the range z-a'):
        matcher.matches("x")


def test_literal_end_crosses_directories() -> None:
    matcher = PatternMatcher(["**b"])
    assert matcher.matches("x/ab")
    assert matcher.matches("x/ab/c")
    assert not matcher.matches("x/bc")

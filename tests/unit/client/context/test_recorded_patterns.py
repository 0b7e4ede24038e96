"""Ignore files and patterns give what moby/patternmatcher gave, row by row."""

from __future__ import annotations

import base64
from typing import Any

from offload_client.context.ignorefile import parse_ignore_file
from offload_core.errors import ContextError
from offload_core.patterns import PatternMatcher


def _verdict(matcher: PatternMatcher, path: str) -> str:
    try:
        return "1" if matcher.matches(path) else "0"
    except ContextError:
        return "E"


def _walked_verdict(matcher: PatternMatcher, path: str) -> str:
    parts = path.split("/")
    matched, state = False, 0
    try:
        for end in range(1, len(parts) + 1):
            matched, state = matcher.match_child("/".join(parts[:end]), state)
    except ContextError:
        return "E"
    return "1" if matched else "0"


def test_every_recorded_ignore_file_parses_as_in_go(corpus: dict[str, Any]) -> None:
    wrong = []
    for row in corpus["ignore_files"]:
        text = base64.b64decode(row["text"])
        expected = "refused" if row.get("failed") else row["patterns"] or []
        try:
            got: object = parse_ignore_file(text)
        except ContextError:
            got = "refused"
        if got != expected:
            wrong.append((text[:80], got, expected))
    assert not wrong
    assert len(corpus["ignore_files"]) > 1000


def test_every_recorded_pattern_set_gives_gos_verdicts(corpus: dict[str, Any]) -> None:
    wrong = []
    checked = 0
    for row in corpus["matches"]:
        try:
            matcher = PatternMatcher(row["patterns"])
        except ContextError:
            if not row.get("refused"):
                wrong.append((row["patterns"], "refused"))
            continue
        if row.get("refused"):
            wrong.append((row["patterns"], "accepted"))
            continue
        recorded = zip(row["paths"], row["verdicts"], row["walked"], strict=True)
        for path, verdict, walked in recorded:
            checked += 1
            got = _verdict(matcher, path), _walked_verdict(matcher, path)
            if got != (verdict, walked):
                wrong.append((row["patterns"], path, got, (verdict, walked)))
    assert not wrong
    assert checked > 50_000

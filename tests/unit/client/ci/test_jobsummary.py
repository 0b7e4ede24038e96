"""Summaries say what happened, and nothing in them is markup of somebody else's."""

from __future__ import annotations

import re

from offload_client.ci.jobsummary import MAX_BYTES, Outcome, escaped, summary_markdown
from offload_client.progress.model import BuildView
from offload_client.progress.summary import Totals, summary_facts
from tests.unit.client.progress.recorded import Scribe

SCRIBE = Scribe()
EVIL = "</code></details><img src=x onerror=y> | [a](http://b) `c` **d** <!-- \x1b[31m\u202e @team"


def outcome(**changes: object) -> Outcome:
    view = BuildView(0.0)
    view.apply(SCRIBE.vertex("a", "[1/2] FROM base", start=1, end=1, cached=True), 0.0)
    view.apply(SCRIBE.vertex("b", f"[2/2] RUN {EVIL}", start=1, end=3), 0.0)
    warning = SCRIBE.warning("b", EVIL, source_filename="Dockerfile")
    warning.warnings[0].ranges.add(start_line=7, end_line=7)
    view.apply(warning, 0.0)
    totals = Totals(steps=4, cached=3, context_bytes=2_000_000, context_sent_bytes=500_000)
    values = {
        "title": "app:1",
        "images": {"": "sha256:" + "a" * 64},
        "build_ids": ["3f9a"],
        "facts": summary_facts(view, totals, 3.0),
        "totals": totals,
        "saved_seconds": 75.0,
        "steps": view.shown,
        "warnings": view.warnings,
        **changes,
    }
    return Outcome(**values)  # type: ignore[arg-type]


def plain(markdown: str) -> str:
    return re.sub(r"&#(\d+);", lambda mark: chr(int(mark[1])), markdown)


def test_summary_has_the_numbers_of_the_build() -> None:
    text = plain(summary_markdown(outcome()))
    assert text.startswith("### app:1: built\n")
    for part in (
        "3 of 4 steps cached (75%)", "| Context | 2MB, 500kB sent |",
        "1m15s of steps, 1.5MB not sent",
        "sha256:aaaa", "offload logs 3f9a", "Dockerfile:7", "Steps: 2", "| cached |",
    ):  # fmt: skip
        assert part in text


def test_nothing_of_the_build_is_markup() -> None:
    text = summary_markdown(outcome(title=EVIL, error="no", explanation=f"{EVIL}\n</pre>{EVIL}"))
    body = re.sub(r"</?(code|details|summary|pre)>", "", text)
    assert "<" not in body
    pre = re.search(r"<pre>.*?</pre>", text, re.DOTALL)
    assert pre is not None
    rest = text.replace(pre[0], "")
    assert not set("`*[]@\x1b\u202e") & set(rest)
    rows = [line for line in rest.splitlines() if line.startswith("| <code>")]
    assert {line.count("|") for line in rows} == {4}
    assert text.count("</details>") == text.count("<details>") == 1


def test_escaped_text_is_read_as_it_was_written() -> None:
    assert plain(escaped("a_b`c` | <d> & é")) == "a_b`c` | <d> & é"
    assert escaped("two\nlines") == "two lines"
    assert escaped("12.5MB, -x (50%) a.b") == "12.5MB, -x (50%) a.b"
    assert escaped("1. a") == "1&#46; a"
    assert escaped("- www.x") == "&#45; www&#46;x"


def test_summary_is_bounded() -> None:
    long = outcome(error="x", explanation="y\n" * 10_000_000, warnings=outcome().warnings * 50)
    assert len(summary_markdown(long).encode()) < MAX_BYTES + 1000

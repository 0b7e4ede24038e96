"""Frames of the interactive form, compared with files: every change of the form is seen.

`python -m tests.unit.client.progress.test_frames` writes the files anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_client.progress.cells import text_width
from offload_client.progress.model import BuildView
from offload_client.progress.rows import choose_rows
from offload_client.progress.style import Palette, paint
from tests.unit.client.progress.recorded import DATA, Scribe, batches

SIZES = ((20, 12), (40, 24), (80, 24), (132, 8))
COLOURS = Palette.of_environment({"BUILDKIT_COLORS": "run=green:error=255,80,80"})


def frame(view: BuildView, columns: int, rows: int, now: float) -> str:
    """Return what is painted, as text with the escapes of colours."""
    lines = choose_rows(view, now, rows - 2, 6)
    return "".join(
        paint(row.text(columns - 1), row.colour(COLOURS)).replace("\x1b", "^") + "\n"
        for row in lines
    )


def midway() -> BuildView:
    """Return a build with everything that a frame can show."""
    scribe, view = Scribe(), BuildView(0.0)
    long = "[build 3/9] RUN apt-get update && apt-get install --yes build-essential ninja-build"
    for batch in (
        scribe.vertex("a", "[internal] load build definition", start=0, end=0.02),
        scribe.vertex("b", "[build 1/9] FROM docker.io/library/debian:12", start=0, end=3.5),
        scribe.counter("b", "sha256:4f4fb7", 24_000_000, 50_000_000, end=None),
        scribe.vertex("c", "[build 2/9] COPY . /src", start=3.5, end=3.5, cached=True),
        scribe.vertex("d", long, start=4),
        scribe.vertex("e", "[docs 1/2] RUN 文書を作る 🙂 && touch /docs", start=4),
        scribe.vertex("f", "[test 1/1] RUN false", start=4, end=5, error="exit code: 1"),
        scribe.vertex("g", "[lint 1/1] RUN lint", start=4, end=5, error="context canceled"),
        scribe.warning("c", "JSONArgsRecommended: JSON arguments recommended (line 3)"),
        scribe.log("d", b"\x1b[32mGet:1\x1b[0m http://deb.debian.org\r\nGet:2 done\r\n"),
        scribe.log("d", b" 10%\r 50%\r 99%"),
        scribe.log("e", b"caf\xe9 \xff\xfe \t tabs\n" + "進捗 ██████░░░░ 60%\n".encode()),
    ):
        view.apply(batch, 4.0)
    return view


def recorded(name: str) -> BuildView:
    """Return a recorded build at its end."""
    view = BuildView(0.0)
    for batch in batches(name):
        view.apply(batch, 0.0)
    return view


def frames() -> dict[str, str]:
    """Return all frames by the name of their file."""
    found = {}
    for columns, rows in SIZES:
        found[f"midway.{columns}x{rows}.frame"] = frame(midway(), columns, rows, 9.0)
        found[f"failing.{columns}x{rows}.frame"] = frame(recorded("failing"), columns, rows, 0.0)
    return found


@pytest.mark.parametrize("name", sorted(frames()))
def test_frame_is_as_recorded(name: str) -> None:
    assert frames()[name] == (DATA / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("columns", range(1, 140))
def test_no_row_is_wider_than_the_terminal(columns: int) -> None:
    for row in choose_rows(midway(), 9.0, 22, 6):
        assert text_width(row.text(columns)) <= columns


if __name__ == "__main__":
    for file_name, text in frames().items():
        (Path(DATA) / file_name).write_text(text, encoding="utf-8")

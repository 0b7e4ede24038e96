"""What a person at a terminal, a log file and a program see of a build."""

from __future__ import annotations

import json
import re
import subprocess
import time
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.peers import Buildx
from tests.fixtures.contexts import make_context
from tests.unit.client.progress.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.pool import Member, Pool

LINES = 300_000
STEP_LINES = re.compile(rb"^#\d+ \d+\.\d+ (\d+)$", re.MULTILINE)
HOSTILE = r"""RUN printf '\033[31mred\033[0m\r\n 1%%\r50%%\r99%%\n\377\376 caf\351\n' && sleep 1
"""
FAILING = """RUN seq 1 100 && echo no && exit 7
"""


def on_terminal(
    member: Member, terminal: Terminal, *arguments: str | Path, **environment: str
) -> subprocess.Popen[bytes]:
    """Start `offload-build` on a terminal."""
    return subprocess.Popen(
        member.command("offload-build", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=terminal.stream,
        stderr=terminal.stream,
        env={**member.environment, "TERM": "xterm", **environment},
        start_new_session=True,
    )


@pytest.mark.parametrize("columns", [20, 80])
def test_terminal_shows_steps_their_output_and_a_summary(
    member: Member, tmp_path: Path, columns: int
) -> None:
    context = make_context(tmp_path / "c", f"RUN echo {columns}\n{HOSTILE}")
    with Terminal(columns, 40) as terminal:
        building = on_terminal(member, terminal, context)
        terminal.until("=> => # ", seconds=60)
        assert building.wait(60) == 0
        lines = terminal.everything()
    text = "\n".join(lines)
    headers = [line for line in lines if line.startswith("[+] Building")]
    assert len(headers) == 1
    assert "\x1b" not in text
    if columns == 80:
        assert re.search(r"\[\+\] Building \d+\.\ds \((\d+)/\1\) FINISHED", text)
        assert re.search(r"^\[offload\] \d of \d steps cached; context ", text, re.MULTILINE)
        assert re.search(r"^\[offload\] \d+\.\ds: .*steps \d+\.\ds", text, re.MULTILINE)


def test_terminal_that_is_resized_shows_every_step_once(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", "RUN echo resized && sleep 3\n")
    with Terminal(100, 30) as terminal:
        building = on_terminal(member, terminal, context)
        terminal.until("RUN echo resized", seconds=60)
        for columns in (60, 30, 120):
            terminal.resize(columns, 30)
            time.sleep(0.4)
        assert building.wait(60) == 0
        lines = terminal.everything()
    rows = [line for line in lines if line.startswith(" =>") and "RUN echo resized" in line]
    assert len(rows) == 1, "\n".join(lines)


def test_no_color_is_no_color(member: Member, tmp_path: Path) -> None:
    with Terminal(80, 30) as terminal:
        building = on_terminal(member, terminal, make_context(tmp_path / "c"), NO_COLOR="1")
        assert building.wait(60) == 0
        terminal.settle()
        assert not re.search(rb"\x1b\[[0-9;]*m", terminal.received)


def test_failing_step_is_explained_with_its_last_20_lines_and_its_source(
    member: Member, tmp_path: Path
) -> None:
    failed = member.build(make_context(tmp_path / "c", FAILING))
    assert failed.returncode == 1
    _, _, report = failed.stderr.partition("------\n > [")
    shown, _, rest = report.partition("------\n")
    assert [line.split()[1] for line in shown.splitlines()[1:]] == [
        *map(str, range(82, 101)),
        "no",
    ]
    assert re.match(r"Dockerfile:\d\n-{20}\n", rest)
    assert " >>> RUN seq 1 100 " in rest
    assert rest.rstrip().splitlines()[-1].startswith("ERROR: ")
    assert "exit code: 7" in rest


def test_every_line_of_a_flood_is_shown_once_and_kept(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", f"RUN seq 1 {LINES}\n")
    shown = member.build(context)
    assert shown.returncode == 0, shown.stderr[-3000:]
    expected = [b"%d" % number for number in range(1, LINES + 1)]
    assert STEP_LINES.findall(shown.stderr.encode()) == expected
    newest = member.wait_state("succeeded")
    kept = member.offload("logs", newest["build_id"])
    assert STEP_LINES.findall(kept.stdout.encode()) == expected


def test_reader_that_stops_for_a_while_misses_no_line(member: Member, tmp_path: Path) -> None:
    context = make_context(tmp_path / "c", f"RUN echo slow reader && seq 1 {LINES}\n")
    building = subprocess.Popen(
        member.command("offload-build", "--progress", "plain", context),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=member.environment, start_new_session=True,
    )  # fmt: skip
    assert building.stderr is not None
    begun = building.stderr.read(1000)
    time.sleep(3)
    text = begun + building.stderr.read()
    assert building.wait(30) == 0
    building.stderr.close()
    expected = [b"%d" % number for number in range(1, LINES + 1)]
    assert STEP_LINES.findall(text) == expected


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Name all keys of a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}"
            yield from paths(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, path + "[]")
    else:
        yield f"{path}:{type(value).__name__}"


def schema(text: str) -> set[str]:
    """Return the keys and types of JSON lines; of a definition, only that it is there."""
    found = {key for line in text.splitlines() if line.startswith("{")
             for key in paths(json.loads(line))}  # fmt: skip
    return {key for key in found if ".sourceInfo.definition" not in key}


def test_rawjson_has_the_keys_of_buildx(pool: Pool, member: Member, tmp_path: Path) -> None:
    steps = "RUN echo rawjson\nRUN echo warned\nCMD echo shell form\n"
    context = make_context(tmp_path / "c", steps)
    # Once with every step run, once with every step cached.
    runs = [("--no-cache",), ()]
    ours = [member.run("offload-build", "--progress", "rawjson", *run, context) for run in runs]
    assert [run.returncode for run in ours] == [0, 0], ours
    assert '"warnings"' in ours[0].stderr
    file = next(pool.data.glob("node-*/projects/default/buildkit/buildkitd.toml"))
    buildx = Buildx(tmp_path)
    buildx.create("peer", tomllib.loads(file.read_text())["grpc"]["address"][0])
    theirs = [buildx.build("peer", context, "--progress", "rawjson", *run) for run in runs]
    our_schema = set().union(*(schema(run.stderr) for run in ours))
    their_schema = set().union(*(schema(run.output) for run in theirs))
    # Docker's own lines around the progress are of no schema.
    # A status has a total where a layer was fetched: whether one was depends on what the shared
    # cache has by then.
    fetched = {".statuses[].total", ".statuses[].total:int"}
    assert (our_schema ^ their_schema) - fetched == set()

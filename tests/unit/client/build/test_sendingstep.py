"""What users see of the build context's way: amounts, what was saved, the rate."""

from __future__ import annotations

import asyncio
import io
import json
import re
from typing import TYPE_CHECKING

import pytest

from offload_client.build import sendingstep as module
from offload_client.build.sendingstep import SendingStep
from offload_client.progress.display import make_display
from offload_proto.v1.events_pb2 import ProgressBatch, Vertex

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 1_000_000


class Shown:
    """A step on a display of its own."""

    def __init__(self, mode: str) -> None:
        self.screen = io.StringIO()
        self.display = make_display(mode, self.screen, {})
        self.step = SendingStep(self.display)

    def scanned(self, files: int, size_bytes: int) -> None:
        self.step.scanning()
        self.step.listed(files, size_bytes)

    def text(self) -> str:
        self.display.finish(None)
        return self.screen.getvalue()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Shown]:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.05)
    return Shown


def loaded(name: str = "[internal] load build context") -> ProgressBatch:
    vertex = Vertex(digest="sha256:1", name=name)
    vertex.started_at.GetCurrentTime()
    vertex.completed_at.GetCurrentTime()
    return ProgressBatch(vertices=[vertex])


async def test_end_says_what_was_sent_and_saved_and_how_fast(shown: Callable[[str], Shown]) -> None:
    seen = shown("plain")
    seen.scanned(3000, 102 * MB)
    seen.step.wanted(12_400_000)
    await asyncio.sleep(0.2)
    seen.step.sent(6 * MB)
    await asyncio.sleep(0.2)
    seen.step.sent(6_400_000)
    await asyncio.sleep(0.2)
    text = seen.text()
    assert re.search(
        r"^#1 \[offload\] build context: 12\.4MB of 102MB sent in 0\.[45]s "
        r"\([23]\d\.?\d*MB/s\), 89\.6MB saved$",
        text,
        re.MULTILINE,
    ), text
    assert re.search(r"^#1 DONE 0\.[45]s$", text, re.MULTILINE)
    assert re.search(
        r"^#1 transferring context: 6\.00MB / 12\.40MB \([\d.]+MB/s, 89\.6MB saved\) 0\.[23]s$",
        text,
        re.MULTILINE,
    ), text
    assert "saved) 0.4s done" in text or "saved) 0.5s done" in text


async def test_nothing_to_send_is_one_short_step(shown: Callable[[str], Shown]) -> None:
    seen = shown("plain")
    seen.scanned(3000, 102 * MB)
    seen.step.watch(loaded())
    seen.step.watch(loaded())
    seen.step.close(complete=True)
    assert seen.text() == (
        "#1 [offload] build context: 102MB in 3,000 files, nothing to send\n#1 CACHED\n"
    )


@pytest.mark.parametrize(
    "name", ["[context extra] load from client", "[internal] load build context"]
)
async def test_end_of_buildkits_step_tells_that_nothing_is_sent(
    shown: Callable[[str], Shown], name: str
) -> None:
    seen = shown("plain")
    seen.step.scanning()
    seen.step.watch(loaded(name))
    seen.step.listed(1, 10)
    seen.step.watch(loaded("[stage 1/2] COPY . /"))
    seen.display.finish(None)
    assert seen.screen.getvalue() == ""
    seen = shown("plain")
    seen.scanned(1, 10)
    seen.step.watch(loaded(name))
    assert "10B in 1 file, nothing to send" in seen.text()


async def test_build_without_local_files_shows_nothing(shown: Callable[[str], Shown]) -> None:
    seen = shown("plain")
    seen.step.watch(loaded())
    seen.step.close(complete=True)
    assert seen.text() == ""


async def test_everything_new_saves_nothing(shown: Callable[[str], Shown]) -> None:
    seen = shown("plain")
    seen.scanned(5, 5 * MB)
    seen.step.wanted(5 * MB)
    seen.step.sent(5 * MB)
    await asyncio.sleep(0.15)
    text = seen.text()
    assert "build context: 5MB sent in 0.0s\n" in text
    assert "saved" not in text


async def test_short_pauses_do_not_end_the_step_and_long_ones_do(
    shown: Callable[[str], Shown],
) -> None:
    seen = shown("plain")
    seen.scanned(5, 9 * MB)
    for _ in range(3):
        seen.step.wanted(MB)
        seen.step.sent(MB)
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.15)
    seen.step.wanted(MB)
    seen.step.sent(MB)
    seen.step.close(complete=True)
    text = seen.text()
    assert "#1 [offload] build context: 3MB of 9MB sent in" in text
    assert "#2 [offload] build context: 4MB of 9MB sent in" in text
    assert text.count("DONE") == 2


async def test_lost_build_cancels_the_step(shown: Callable[[str], Shown]) -> None:
    seen = shown("plain")
    seen.scanned(5, 9 * MB)
    seen.step.wanted(5 * MB)
    seen.step.sent(MB)
    seen.step.close(complete=False)
    assert seen.text().endswith("#1 CANCELED\n")


async def test_success_before_the_last_acknowledgement_counts_as_sent(
    shown: Callable[[str], Shown],
) -> None:
    seen = shown("plain")
    seen.scanned(5, 5 * MB)
    seen.step.wanted(5 * MB)
    seen.step.sent(4 * MB)
    seen.step.close(complete=True)
    assert "build context: 5MB sent in" in seen.text()


async def test_json_lines_stay_valid_and_carry_the_numbers(shown: Callable[[str], Shown]) -> None:
    seen = shown("rawjson")
    seen.scanned(5, 9 * MB)
    seen.step.wanted(5 * MB)
    await asyncio.sleep(0.12)
    seen.step.sent(5 * MB)
    await asyncio.sleep(0.15)
    lines = [json.loads(line) for line in seen.text().splitlines()]
    statuses = [status for line in lines for status in line.get("statuses", ())]
    assert statuses[-1]["id"] == "transferring context:"
    assert (statuses[-1]["current"], statuses[-1]["total"]) == (5 * MB, 5 * MB)
    assert statuses[-1]["name"].endswith("MB/s, 4MB saved")
    assert "completed" in statuses[-1]
    vertices = [vertex for line in lines for vertex in line.get("vertexes", ())]
    assert len({vertex["digest"] for vertex in vertices}) == 1
    assert vertices[-1]["name"].startswith("[offload] build context: 5MB of 9MB sent")
    assert vertices[-1]["completed"] >= vertices[-1]["started"]

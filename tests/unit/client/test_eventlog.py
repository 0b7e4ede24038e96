"""Events reach the display of the build that they belong to, and never standard output."""

from __future__ import annotations

import asyncio

import pytest

from offload_client.bytepipe import in_thread
from offload_client.eventlog import get_logger, show_events

log = get_logger()


async def collect(*, everything: bool, name: str = "x") -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []

    async def command() -> None:
        show_events(lambda level, text: told.append((level, text)), everything=everything)
        log.info("image.loaded", layers=2)
        await asyncio.sleep(0.01)
        await in_thread(
            lambda: log.warning("credential_helper.failed", helper=name, token="hush"), name="t"
        )

    await asyncio.create_task(command())
    return told


async def test_only_warnings_are_told_as_words() -> None:
    assert await collect(everything=False) == [
        ("warning", "credential helper failed (helper=x, token=***)")
    ]


async def test_debugging_tells_everything() -> None:
    assert await collect(everything=True) == [
        ("info", "image.loaded (layers=2)"),
        ("warning", "credential_helper.failed (helper=x, token=***)"),
    ]


async def test_two_builds_in_one_process_do_not_mix() -> None:
    first, second = await asyncio.gather(
        collect(everything=False, name="one"), collect(everything=False, name="two")
    )
    assert "helper=one" in first[0][1]
    assert "helper=two" in second[0][1]
    assert len(first) == len(second) == 1


def test_outside_of_a_build_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    log.warning("something.failed", reason="x")
    assert capsys.readouterr() == ("", "")

"""Revoked tokens: refused, open calls ended, remembered as long as certificates live."""

from __future__ import annotations

import asyncio
import time

import pytest

from offload_builder import revocations
from offload_builder.revocations import Revocations
from offload_core.errors import AuthenticationError

LATER = time.time() + 3600


async def test_open_call_ends_with_a_sentence_and_others_go_on():
    known = Revocations()
    ended: list[str] = []

    async def call(token_id: str) -> None:
        try:
            with known.call(token_id):
                await asyncio.sleep(0.2)
                ended.append("well")
        except AuthenticationError as error:
            ended.append(error.message)
        # The task itself is not cancelled.
        await asyncio.sleep(0)

    tasks = [asyncio.ensure_future(call(name)) for name in ("a", "b")]
    await asyncio.sleep(0.01)
    known.take({"a": LATER})
    await asyncio.gather(*tasks)
    assert ended == ["the token a behind this certificate was revoked", "well"]
    assert known._calls == {}


async def test_call_that_is_cancelled_by_its_client_as_well_stays_cancelled():
    known = Revocations()

    async def call() -> None:
        with known.call("a"):
            await asyncio.sleep(10)

    task = asyncio.ensure_future(call())
    await asyncio.sleep(0)
    task.cancel()
    known.take({"a": LATER})
    with pytest.raises(asyncio.CancelledError):
        await task


def test_entries_outlive_the_process_and_end_with_the_certificates(tmp_path):
    path = tmp_path / "revocations.json"
    known = Revocations(path)
    known.take({"a": LATER, "old": time.time() - 1})
    again = Revocations(path)
    assert "a" in again
    assert "old" not in again
    with pytest.raises(AuthenticationError):
        again.check("a")
    again.check("b")
    again.take({})
    assert len(Revocations(path)) == 0


def test_damaged_file_counts_as_empty(tmp_path):
    path = tmp_path / "revocations.json"
    path.write_text("[1, 2")
    assert len(Revocations(path)) == 0


def test_number_is_bounded_and_the_longest_are_kept(monkeypatch):
    monkeypatch.setattr(revocations, "MAX_REVOCATIONS", 10)
    known = Revocations()
    known.take({f"t{number}": LATER + number for number in range(100)})
    assert len(known) == 10
    assert "t99" in known


def test_listeners_hear_what_was_added():
    known = Revocations()
    heard: list[frozenset[str]] = []
    known.on_revoked(heard.append)
    known.take({"a": LATER})
    known.take({"a": LATER})
    known.take({"a": LATER, "b": LATER})
    assert heard == [frozenset("a"), frozenset("b")]

"""What this machine says of a session that has ended."""

from __future__ import annotations

import asyncio
import logging

from offload_client.sessions.helper import Helper
from offload_client.sessions.records import SessionRecord, forget_end, noted_end, write_record
from offload_client.sessions.statusview import pretty_lines, urgent_news, view_of_helper

RECORD = SessionRecord("a" * 16, "work", "default", "gw:1", "docker-offload-work", 0.0)


class Ended:
    """A tunnel to nowhere."""

    reconnecting_since = None

    def __init__(self, reason: str) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended.set_result(reason)


class InPlace:
    """A proxy whose socket is there."""

    in_place = True


async def test_helper_goes_some_time_after_its_session_and_leaves_a_note(tmp_path):
    directory = tmp_path / "work"
    write_record(directory, RECORD)
    helper = Helper(directory, RECORD, logging.getLogger("test"), tell_seconds=0.0)
    async with asyncio.timeout(60):
        await helper._until_over(Ended("its time is over"), InPlace())
    assert noted_end(directory) == "its time is over"
    forget_end(directory)
    assert noted_end(directory) == ""


def test_status_of_an_ended_session_says_why_and_what_to_do():
    answer = {"state": "ended", "reason": "its time is over", "reconnecting_since": 3.0}
    view = view_of_helper(RECORD, answer, 10.0, "")
    assert view["state"] == "ended"
    assert view["reason"] == "its time is over; clear it away with: offload stop work"
    assert "  State:            Ended" in pretty_lines(view)
    assert urgent_news(view) == "The session has ended: offload stop work"

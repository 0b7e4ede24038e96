"""Progress on its way to clients of BuildKit: the queue, and what the daemon tells."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.buildkit.status import progress_batch
from offload_builder.node.proxy import feed as feed_module
from offload_builder.node.proxy import queuenote
from offload_builder.node.proxy.feed import StatusFeed
from offload_builder.node.proxy.queuenote import QueueNote


async def collect(feed):
    return [message async for run in feed.watch() for message in run]


def shown(messages):
    """Return names of steps and lines, in order."""
    found = []
    for message in messages:
        batch = progress_batch(message)
        found += [vertex.name for vertex in batch.vertices if not vertex.HasField("completed_at")]
        found += [log.data.decode().strip() for log in batch.logs]
    return found


async def test_a_watcher_that_comes_late_sees_the_queue():
    feed = StatusFeed()
    feed.tell(b"one")
    watching = asyncio.ensure_future(collect(feed))
    await asyncio.sleep(0)
    feed.tell(b"two")
    feed.finish()
    feed.tell(b"too late")
    assert await watching == [b"one", b"two"]


async def test_two_watchers_see_what_comes_from_then_on():
    feed = StatusFeed()
    first = asyncio.ensure_future(collect(feed))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(collect(feed))
    await asyncio.sleep(0)
    await feed.put(b"x")
    feed.finish()
    assert await first == await second == [b"x"]


async def test_a_slow_watcher_holds_up_the_daemon_and_one_that_leaves_does_not(monkeypatch):
    monkeypatch.setattr(feed_module, "MAX_UNREAD_BYTES", 10)
    feed = StatusFeed()
    watcher = feed.watch()
    first = asyncio.ensure_future(anext(watcher))
    await asyncio.sleep(0)
    await feed.put(b"12345")
    assert await first == [b"12345"]
    putting = asyncio.ensure_future(feed.put(b"x" * 20))
    await asyncio.sleep(0.01)
    assert not putting.done()
    await watcher.aclose()
    await asyncio.wait_for(putting, 1)


async def test_places_in_the_queue_are_steps_with_their_reason():
    feed = StatusFeed()
    with QueueNote(feed, "ref") as note:
        note.place(2, "node one is busy")
        note.place(2, "node one is busy")
        note.place(1, "node one is busy")
        note.place(1, "other builds are before it")
    feed.finish()
    messages = await collect(feed)
    assert shown(messages) == [
        "[offload] waiting for a node, queue position 2", "node one is busy",
        "[offload] waiting for a node, queue position 1", "node one is busy",
        "other builds are before it",
    ]  # fmt: skip
    ended = [v for m in messages for v in progress_batch(m).vertices if v.HasField("completed_at")]
    assert len(ended) == 2


async def test_a_wait_is_refreshed_so_that_no_deadline_fires(monkeypatch):
    monkeypatch.setattr(queuenote, "REFRESH_SECONDS", 0.02)
    monkeypatch.setattr(queuenote, "PATIENCE_SECONDS", 0.02)
    feed = StatusFeed()
    with QueueNote(feed, "ref") as note:
        note.place(3, "node one is busy")
        await asyncio.sleep(0.15)
    feed.finish()
    assert sum("waiting for" in line and "busy" in line for line in shown(await collect(feed))) >= 3


async def test_a_build_beside_another_one_says_what_it_waits_for(monkeypatch):
    monkeypatch.setattr(queuenote, "PATIENCE_SECONDS", 0.01)
    feed = StatusFeed()
    with QueueNote(feed, "ref"):
        await asyncio.sleep(0.05)
    feed.finish()
    assert shown(await collect(feed))[0] == "[offload] waiting for a node"


async def test_a_short_wait_shows_nothing():
    feed = StatusFeed()
    with QueueNote(feed, "ref"):
        await asyncio.sleep(0)
    feed.finish()
    assert await collect(feed) == []


async def test_a_refusal_ends_the_step_with_its_reason():
    feed = StatusFeed()
    with pytest.raises(ValueError, match="too full"), QueueNote(feed, "ref") as note:
        note.place(1, "busy")
        raise ValueError("the queue is too full")
    feed.finish()
    last = progress_batch((await collect(feed))[-1])
    assert last.vertices[0].error == "the queue is too full"

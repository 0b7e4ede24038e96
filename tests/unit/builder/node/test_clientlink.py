"""The conversation with a client: answers find their questions, and nothing waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node import clientlink
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.entries import check_path
from offload_builder.node.outbox import Outbox
from offload_core.errors import ContextChangedError, ContextError, NodeLostError, UsageError
from offload_proto.v1.node_service_pb2 import (
    BlobFailure,
    ContextEntries,
    ContextEntry,
    ContextFailure,
    CredentialsReply,
    Notice,
    RunResponse,
)

A, B = b"a" * 32, b"b" * 32


@pytest.fixture
async def link():
    found = ClientLink()
    yield found
    found.lose(NodeLostError("the test is over"))


async def ask(link: ClientLink) -> tuple[asyncio.Task[list[ContextEntry]], int]:
    asking = asyncio.ensure_future(link.request_context("context", [], [], []))
    message = await link.outbox.get()
    return asking, message.context_request.request_id


def entries(request_id: int, *paths: str, last: bool = True) -> ContextEntries:
    found = [ContextEntry(path=path, sha256=A, mode=0o644) for path in paths]
    return ContextEntries(request_id=request_id, entries=found, last=last)


async def test_listing_comes_in_pieces(link):
    asking, number = await ask(link)
    link.context_entries(entries(number, "a", last=False))
    link.context_entries(entries(number, "b"))
    assert [entry.path for entry in await asking] == ["a", "b"]


async def test_two_listings_do_not_mix(link):
    first, one = await ask(link)
    second, two = await ask(link)
    link.context_entries(entries(two, "second"))
    link.context_entries(entries(one, "first"))
    assert [entry.path for entry in await first] == ["first"]
    assert [entry.path for entry in await second] == ["second"]


async def test_listing_that_was_given_up_is_ignored_and_an_unknown_one_refused(link):
    asking, number = await ask(link)
    asking.cancel()
    await asyncio.wait((asking,))
    link.context_entries(entries(number, "late"))
    with pytest.raises(UsageError, match="not asked for"):
        link.context_entries(entries(number + 1, "x"))
    with pytest.raises(UsageError, match="not asked for"):
        link.context_entries(entries(0, "x"))


async def test_too_large_listing_is_refused(link, monkeypatch):
    monkeypatch.setattr(clientlink, "MAX_ENTRIES", 2)
    asking, number = await ask(link)
    with pytest.raises(UsageError, match="too large"):
        link.context_entries(entries(number, "a", "b", "c", last=False))
    monkeypatch.setattr(clientlink, "MAX_LISTING_BYTES", 100)
    with pytest.raises(UsageError, match="too large"):
        link.context_entries(entries(number, "a" * 200, last=False))
    asking.cancel()


@pytest.mark.parametrize(("changed", "kind"), [(False, ContextError), (True, ContextChangedError)])
async def test_failure_of_a_listing_is_raised(link, changed, kind):
    asking, number = await ask(link)
    link.context_failure(ContextFailure(request_id=number, message="no", changed=changed))
    with pytest.raises(kind, match="no"):
        await asking


async def test_blobs_are_asked_for_once_and_awaited_by_many(link):
    await link.request_blobs({A: 1, B: 2})
    await link.request_blobs({A: 1})
    assert list((await link.outbox.get()).need_blobs.sha256) == [A, B]
    assert not link.outbox._messages
    waiting = [asyncio.ensure_future(link.arrival(A)) for _ in range(3)]
    waiting[0].cancel()
    await asyncio.sleep(0)
    link.blobs_arrived([A])
    await asyncio.gather(*waiting[1:])
    assert (link.wanted(A), link.wanted(B), link.size(B)) == (False, True, 2)
    link.blob_failure(BlobFailure(sha256=B, message="changed"))
    with pytest.raises(ContextChangedError, match="changed"):
        await link.arrival(B)
    await link.arrival(b"c" * 32)


async def test_many_blobs_are_asked_for_in_several_messages(link):
    await link.request_blobs({number.to_bytes(32): 1 for number in range(25_000)})
    sizes = [len((await link.outbox.get()).need_blobs.sha256) for _ in range(3)]
    assert sizes == [10_000, 10_000, 5_000]


async def test_lost_client_ends_everything_and_nothing_new_begins(link):
    asking, _ = await ask(link)
    await link.request_blobs({A: 1})
    arrival = asyncio.ensure_future(link.arrival(A))
    login = asyncio.ensure_future(link.request_credentials("host"))
    await asyncio.sleep(0)
    link.lose(UsageError("the first word"))
    link.lose(NodeLostError("the second word"))
    for waiting in (asking, arrival, login):
        with pytest.raises(UsageError, match="the first word"):
            await waiting
    for attempt in (
        link.request_context("context", [], [], []),
        link.request_blobs({B: 1}),
        link.request_credentials("host"),
    ):
        with pytest.raises(UsageError, match="the first word"):
            await attempt


async def test_credentials_are_answered_or_none_in_time(link, monkeypatch):
    monkeypatch.setattr(clientlink, "CREDENTIALS_SECONDS", 0.05)
    asking = asyncio.ensure_future(link.request_credentials("host"))
    number = (await link.outbox.get()).credentials_request.request_id
    link.credentials_reply(CredentialsReply(request_id=number, username="u", secret="s"))
    assert await asking == ("u", "s")
    assert await link.request_credentials("other") == ("", "")


async def test_silent_client_is_given_up_and_a_busy_one_is_not():
    link = ClientLink(silence_seconds=0.2)
    asking, _ = await ask(link)
    for _ in range(6):
        await asyncio.sleep(0.1)
        link.heard()
    assert not asking.done()
    with pytest.raises(ContextError, match="was silent for"):
        await asyncio.wait_for(asking, 2)
    assert link._watching is None
    link.lose(NodeLostError("over"))


def response(text: str) -> RunResponse:
    return RunResponse(notice=Notice(text=text))


async def test_full_outbox_holds_the_writer_until_it_is_read_or_dropped():
    outbox = Outbox(limit=2)
    await outbox.put(response("1"))
    await outbox.put(response("2"))
    blocked = [asyncio.ensure_future(outbox.put(response(text))) for text in "34"]
    await asyncio.sleep(0)
    assert not any(task.done() for task in blocked)
    assert (await outbox.get()).notice.text == "1"
    await asyncio.sleep(0.01)
    assert sum(task.done() for task in blocked) == 1
    outbox.drop()
    await asyncio.gather(*blocked)
    assert await outbox.get() is None
    await outbox.put(response("nobody reads this"))
    assert await outbox.get() is None


async def test_outbox_gives_what_is_queued_before_its_end():
    outbox = Outbox(limit=2)
    reading = asyncio.ensure_future(outbox.get())
    await asyncio.sleep(0)
    await outbox.put(response("1"))
    outbox.finish()
    assert (await reading).notice.text == "1"
    assert await outbox.get() is None
    assert outbox.taken == 1


@pytest.mark.parametrize("path", ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "./a", "a/./b",
                                  "a/../b", "a\0b", "x" * 5000])  # fmt: skip
def test_bad_paths_are_refused(path):
    with pytest.raises(UsageError):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b", ".a", "..a", "a..", "...", "a/...b", "a b/ü", "a\\b"])
def test_odd_but_clean_paths_are_taken(path):
    check_path(path)

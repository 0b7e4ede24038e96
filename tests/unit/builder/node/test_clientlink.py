"""The conversation with a client: answers find their questions, and nothing waits for ever."""

from __future__ import annotations

import asyncio

import pytest
import zstandard

from offload_builder.node import clientlink, listingfeed
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.outbox import Outbox
from offload_core.errors import ContextChangedError, ContextError, NodeLostError, UsageError
from offload_core.listing import MAX_PAGE_BYTES, deltas
from offload_proto.v1.node_service_pb2 import (
    ContextFailure,
    ContextListing,
    ContextPage,
    CredentialsReply,
    Notice,
    RunResponse,
)

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


@pytest.fixture
async def link():
    found = ClientLink()
    yield found
    found.lose(NodeLostError("the test is over"))


async def ask(link: ClientLink):
    feed = await link.request_context("context", [], [], [])
    assert (await link.outbox.get()).context_request.request_id == feed.request_id
    return feed


def listing(feed, *pages: bytes, last: bool = True) -> ContextListing:
    return ContextListing(request_id=feed.request_id, pages=b"".join(pages), last=last)


def page(feed, number: int, data: bytes = b"", times=(), *, zstd: bool = False) -> ContextPage:
    return ContextPage(
        request_id=feed.request_id,
        page=number,
        data=data,
        zstd=zstd,
        modified_at_deltas_ns=deltas(times),
    )


async def test_names_of_pages_come_in_pieces(link):
    feed = await ask(link)
    link.context_listing(listing(feed, A, last=False))
    assert await feed.announced() == [A]
    waiting = asyncio.ensure_future(feed.announced())
    await asyncio.sleep(0)
    link.context_listing(listing(feed, B, C))
    assert await waiting == [B, C]
    assert await feed.announced() == []
    assert await feed.announced() == []


async def test_two_listings_do_not_mix(link):
    one, two = await ask(link), await ask(link)
    link.context_listing(listing(two, B))
    link.context_listing(listing(one, A))
    assert await one.announced() == [A]
    assert await two.announced() == [B]


async def test_pages_and_times_are_asked_for_and_taken_once(link):
    feed = await ask(link)
    await feed.need([0, 2], [1])
    need = (await link.outbox.get()).need_pages
    assert (list(need.pages), list(need.times)) == ([0, 2], [1])
    link.context_page(page(feed, 1, times=[7, 5]))
    assert not feed.ready(0)
    assert feed.ready(1)
    assert (await feed.page(1)).times_ns == [7, 5]
    link.context_page(page(feed, 0, b"data", [1]))
    found = await feed.page(0)
    assert (found.data, found.zstd, found.times_ns) == (b"data", False, [1])
    for again in (0, 1):
        with pytest.raises(UsageError, match="not asked for"):
            link.context_page(page(feed, again, b"data"))


async def test_only_so_many_pages_are_under_way(link):
    feed = await ask(link)
    asking = asyncio.ensure_future(feed.need(range(700), []))
    asked: list[int] = []
    windows = []
    while len(asked) < 700:
        need = list((await link.outbox.get()).need_pages.pages)
        windows.append(len(need))
        for number in need:
            link.context_page(page(feed, number, b"x"))
        for number in need:
            await feed.page(number)
        asked += need
    await asking
    assert asked == list(range(700))
    # Small until the first page has shown that pages are small.
    assert windows[0] == listingfeed._FIRST_PAGES_IN_FLIGHT
    assert max(windows) <= listingfeed.PAGES_IN_FLIGHT


async def test_listing_that_was_given_up_is_ignored_and_an_unknown_one_refused(link):
    feed = await ask(link)
    feed.close()
    link.context_listing(listing(feed, A))
    link.context_page(page(feed, 0, b"late"))
    link.context_failure(ContextFailure(request_id=feed.request_id, message="late"))
    for number in (0, feed.request_id + 1):
        with pytest.raises(UsageError, match="not asked for"):
            link.context_listing(ContextListing(request_id=number))
        with pytest.raises(UsageError, match="not asked for"):
            link.context_page(ContextPage(request_id=number))


BOMB = zstandard.compress(bytes(MAX_PAGE_BYTES + 1))
SIZELESS = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
BAD_PAGES = {
    "not asked for": (5, b"x", False, "not asked for"),
    "data for times": (1, b"x", False, "damaged"),
    "times for data": (0, b"", False, "damaged"),
    "too large": (0, bytes(MAX_PAGE_BYTES + 1), False, "at most"),
    "bomb": (0, BOMB, True, "at most"),
    "no zstd": (0, b"nothing", True, "damaged"),
    "bomb that hides its size": (0, SIZELESS, True, "damaged"),
}


@pytest.mark.parametrize(("number", "data", "zstd", "sentence"), BAD_PAGES.values(), ids=BAD_PAGES)
async def test_a_bad_page_is_refused_before_it_is_unpacked(link, number, data, zstd, sentence):
    feed = await ask(link)
    await feed.need([0], [1])
    with pytest.raises(UsageError, match=sentence):
        link.context_page(page(feed, number, data, zstd=zstd))


async def test_too_large_listings_are_refused(link, monkeypatch):
    feed = await ask(link)
    with pytest.raises(UsageError, match="damaged"):
        link.context_listing(listing(feed, b"short"))
    monkeypatch.setattr(listingfeed, "MAX_PAGES", 2)
    with pytest.raises(UsageError, match=r"too large.*\.dockerignore"):
        link.context_listing(listing(feed, A, B, C, last=False))
    feed = await ask(link)
    link.context_listing(listing(feed, A))
    with pytest.raises(UsageError, match="had ended"):
        link.context_listing(listing(feed, A))
    await feed.need([0, 1], [])
    monkeypatch.setattr(listingfeed, "MAX_LISTING_BYTES", 100)
    link.context_page(page(feed, 0, b"x" * 60))
    with pytest.raises(UsageError, match="too large"):
        link.context_page(page(feed, 1, b"x" * 60))


async def test_pages_that_nobody_has_looked_at_are_bounded(link, monkeypatch):
    monkeypatch.setattr(listingfeed, "MAX_WAITING_BYTES", 100)
    feed = await ask(link)
    await feed.need([0, 1, 2], [])
    link.context_page(page(feed, 0, b"x" * 60))
    await feed.page(0)
    link.context_page(page(feed, 1, b"x" * 60))
    with pytest.raises(UsageError, match="too large"):
        link.context_page(page(feed, 2, b"x" * 60))


@pytest.mark.parametrize(("changed", "kind"), [(False, ContextError), (True, ContextChangedError)])
async def test_failure_of_a_listing_is_raised(link, changed, kind):
    feed = await ask(link)
    waiting = asyncio.ensure_future(feed.announced())
    await asyncio.sleep(0)
    link.context_failure(ContextFailure(request_id=feed.request_id, message="no", changed=changed))
    with pytest.raises(kind, match="no"):
        await waiting
    with pytest.raises(kind, match="no"):
        await feed.page(0)


async def test_lost_client_ends_everything_and_nothing_new_begins(link):
    feed = await ask(link)
    listed = asyncio.ensure_future(feed.announced())
    login = asyncio.ensure_future(link.request_credentials("host"))
    told: list[Exception] = []
    await asyncio.sleep(0)
    with link.expect(told.append):
        link.lose(UsageError("the first word"))
        link.lose(NodeLostError("the second word"))
    assert {str(error) for error in told} == {"the first word"}
    assert str(link.error) == "the first word"
    for waiting in (listed, login):
        with pytest.raises(UsageError, match="the first word"):
            await waiting
    for attempt in (
        link.request_context("context", [], [], []),
        link.request_credentials("host"),
        feed.page(3),
    ):
        with pytest.raises(UsageError, match="the first word"):
            await attempt
    with pytest.raises(UsageError, match="the first word"), link.expect(told.append):
        pass


async def test_credentials_are_answered_or_none_in_time(link, monkeypatch):
    monkeypatch.setattr(clientlink, "CREDENTIALS_SECONDS", 0.05)
    asking = asyncio.ensure_future(link.request_credentials("host"))
    number = (await link.outbox.get()).credentials_request.request_id
    link.credentials_reply(CredentialsReply(request_id=number, username="u", secret="s"))
    assert await asking == ("u", "s")
    assert await link.request_credentials("other") == ("", "")


async def test_silent_client_is_given_up_and_a_busy_one_is_not():
    link = ClientLink(silence_seconds=0.2)
    feed = await ask(link)
    waiting = asyncio.ensure_future(feed.announced())
    for _ in range(6):
        await asyncio.sleep(0.1)
        link.heard()
    assert not waiting.done()
    with pytest.raises(ContextError, match="was silent for"):
        await asyncio.wait_for(waiting, 2)
    link.lose(NodeLostError("over"))


async def test_a_client_of_which_nothing_is_expected_may_be_silent():
    link = ClientLink(silence_seconds=0.1)
    told: list[Exception] = []
    with link.expect(told.append):
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    assert told == []
    assert link._watching is None
    with link.expect(told.append):
        await asyncio.sleep(0.3)
    assert "was silent for" in str(told[0])
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


async def test_login_and_secret_are_waited_for_while_the_client_is_away(link, monkeypatch):
    monkeypatch.setattr(clientlink, "CREDENTIALS_SECONDS", 0.05)
    monkeypatch.setattr(clientlink, "SECRET_SECONDS", 0.05)
    login = asyncio.ensure_future(link.request_credentials("r.example"))
    secret = asyncio.ensure_future(link.request_secret("s"))
    await asyncio.sleep(0)
    link.detach(link.outbox)
    await asyncio.sleep(0.2)
    assert not login.done()
    assert not secret.done()
    link.attach(Outbox())
    asked = {message.WhichOneof("message"): message for message in link.repeated(context=False)}
    request_id = asked["credentials_request"].credentials_request.request_id
    link.credentials_reply(CredentialsReply(request_id=request_id, username="u", secret="p"))
    assert await asyncio.wait_for(login, 5) == ("u", "p")
    # One that is there and does not answer is not waited for.
    with pytest.raises(ContextError, match="has not sent the secret s"):
        await asyncio.wait_for(secret, 5)
    assert await asyncio.wait_for(link.request_credentials("r.example"), 5) == ("", "")

"""Who has the seat of a build's client, and what happens when nobody has."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node import departure
from offload_builder.node.clientlink import ClientLink
from offload_builder.node.departure import ClientSeat, Visit
from offload_builder.node.needs import ClientNeeds
from offload_core.errors import (
    AccessDeniedError,
    ContextChangedError,
    NodeLostError,
    UsageError,
)
from offload_proto.v1.node_service_pb2 import ContextListing, CredentialsReply, RunResponse


class Build:
    """A link and its seat."""

    def __init__(self, rejoin_seconds: float = 60.0, *, detached: bool = False) -> None:
        self.link, self.needs = ClientLink(), ClientNeeds()
        self.given_up: list[str] = []
        self.seat = ClientSeat(
            "b", self.link, self.needs, rejoin_seconds, self.given_up.append, self.repeat,
            detached=detached,
        )  # fmt: skip

    def repeat(self) -> list[RunResponse]:
        return self.link.repeated(context=self.needs.needs_context())


@pytest.fixture
async def build():
    found = Build()
    yield found
    found.seat.close()
    found.link.lose(NodeLostError("over"))


async def said(visit: Visit, kind: str) -> RunResponse:
    async with asyncio.timeout(5):
        while (message := await visit.outbox.get()) is not None:
            if message.WhichOneof("message") == kind:
                return message
    raise AssertionError("nothing was said")


async def test_nobody_is_given_up_while_nothing_is_needed():
    build = Build(rejoin_seconds=0.02)
    build.seat.lost(build.seat.first())
    await asyncio.sleep(0.06)
    assert build.given_up == []
    build.needs.begin("the build context")
    await asyncio.sleep(0.06)
    assert build.given_up == ["the client went away"]
    build.seat.close()


async def test_who_comes_back_in_time_stops_the_clock():
    build = Build(rejoin_seconds=0.05)
    build.needs.begin("x")
    build.seat.lost(build.seat.first())
    build.seat.rejoin(Visit())
    await asyncio.sleep(0.1)
    assert build.given_up == []
    build.seat.close()


async def test_viewer_takes_no_seat(build):
    first, viewer = build.seat.first(), Visit(view_only=True)
    build.seat.rejoin(viewer)
    assert build.link.outbox is first.outbox
    build.needs.begin("x")
    for visit in (first, viewer):
        assert (await said(visit, "independence")).independence.independent
        assert (await said(visit, "independence")).independence.needs == "x"
    build.seat.gone(viewer)
    assert not build.link.away
    build.needs.end("x")
    build.seat.gone(first)
    assert build.link.away
    assert build.seat.empty


async def test_second_client_sends_the_first_away(build):
    first, second = build.seat.first(), Visit()
    build.seat.rejoin(second)
    assert isinstance(first.error, AccessDeniedError)
    assert await first.outbox.get() is None
    # The end of the first call changes nothing any more.
    build.seat.gone(first)
    assert build.link.outbox is second.outbox


async def test_open_question_about_a_login_is_repeated_and_answered_by_the_next(build):
    visit = build.seat.first()
    asking = asyncio.ensure_future(build.link.request_credentials("registry.example"))
    number = (await said(visit, "credentials_request")).credentials_request.request_id
    build.seat.lost(visit)
    again = Visit()
    build.seat.rejoin(again)
    repeated = (await said(again, "credentials_request")).credentials_request
    assert (repeated.request_id, repeated.host) == (number, "registry.example")
    reply = CredentialsReply(request_id=number, username="a", secret="b")
    build.link.credentials_reply(reply)
    assert await asking == ("a", "b")


@pytest.mark.parametrize("detached", [False, True])
async def test_login_that_nobody_can_tell_is_none_at_once_when_the_user_has_left(detached):
    build = Build(detached=detached)
    visit = build.seat.first()
    asking = asyncio.ensure_future(build.link.request_credentials("registry.example"))
    await said(visit, "credentials_request")
    if detached:
        build.seat.lost(visit)
    else:
        assert build.seat.leave(visit)
    async with asyncio.timeout(1):
        assert await asking == ("", "")
        assert await build.link.request_credentials("other.example") == ("", "")
    build.seat.close()


async def test_leaving_is_refused_while_the_client_is_needed(build):
    visit = build.seat.first()
    build.needs.begin("the SSH agent")
    assert not build.seat.leave(visit)
    assert not visit.left
    build.needs.end("the SSH agent")
    assert build.seat.leave(visit)
    assert await visit.outbox.get() is None


async def test_listing_is_asked_for_again_and_must_be_the_same(build):
    visit = build.seat.first()
    feed = await build.link.request_context("context", [], [], [])
    pages = [bytes([number]) * 32 for number in range(4)]
    build.needs.begin("the build context")

    def announce(*numbers: int, last: bool = False) -> None:
        data = b"".join(pages[number] for number in numbers)
        build.link.context_listing(
            ContextListing(request_id=feed.request_id, pages=data, last=last)
        )

    announce(0, 1)
    assert await feed.announced() == pages[:2]
    await feed.need([1], [0])
    build.seat.lost(visit)
    again = Visit()
    build.seat.rejoin(again)
    assert (await said(again, "context_request")).context_request.local_name == "context"
    need = (await said(again, "need_pages")).need_pages
    assert (list(need.pages), list(need.times)) == ([1], [0])
    announce(0)
    announce(1, 2, 3, last=True)
    assert await feed.announced() == pages[2:]
    assert await feed.announced() == []
    # Once more, when all was listed.
    build.seat.rejoin(Visit())
    announce(0, 1, 2, 3, last=True)
    assert await feed.announced() == []
    build.seat.rejoin(Visit())
    with pytest.raises(ContextChangedError, match="changed while its client was away"):
        announce(0, 2)
    build.seat.rejoin(Visit())
    with pytest.raises(ContextChangedError):
        announce(0, 1, 2, last=True)
    feed.close()


async def test_client_that_asks_to_leave_without_end_is_sent_away(build):
    build.needs.begin("x")
    first = build.seat.first()
    for _ in range(departure.MAX_REFUSALS):
        assert not build.seat.leave(first)
    with pytest.raises(UsageError, match="again and again"):
        build.seat.leave(first)

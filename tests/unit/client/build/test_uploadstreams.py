"""Uploads over long and broken ways: how many connections, and what a lost one costs."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from offload_client.build.upload import MAX_STREAMS, QUIET_SECONDS
from offload_core.errors import NodeLostError
from tests.fixtures.cutrelay import CutRelay
from tests.fixtures.uploadreceiver import receiving, sending

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fixtures.uploadreceiver import Sender

LARGE_BYTES = 64 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one large file of noise."""
    root = tmp_path_factory.mktemp("large")
    (root / "large").write_bytes(os.urandom(LARGE_BYTES))
    return root


@pytest.fixture
def relay() -> Iterator[CutRelay]:
    with CutRelay() as running:
        yield running


async def whole(sender: Sender) -> None:
    """Check that everything arrives."""
    await sender.until(sender.want_all())
    expected = {*sender.digests().values(), *sender.pieces("large")}
    assert set(sender.receiver.blobs) == expected
    assert sender.said == []


async def test_long_way_with_much_to_send_gets_more_connections_and_closes_them(
    large: Path, relay: CutRelay
) -> None:
    async with receiving() as (receiver, address):
        relay.target, relay.delay, relay.rate = address, 0.03, 16e6
        async with sending(large, receiver, relay.address) as sender:
            await whole(sender)
            assert receiver.calls == MAX_STREAMS
            assert sum(receiver.blobs.values()) == len(receiver.blobs)
            assert sender.channels == MAX_STREAMS - 1
            async with asyncio.timeout(QUIET_SECONDS + 5):
                while sender.channels:
                    await asyncio.sleep(0.05)
            assert sender.uploader.connections == 1
            assert not sender.task.done()


async def test_long_way_with_little_to_send_keeps_its_one_connection(
    tmp_path: Path, relay: CutRelay
) -> None:
    (tmp_path / "large").write_bytes(os.urandom(20 << 20))
    async with receiving() as (receiver, address):
        relay.target, relay.delay = address, 0.03
        async with sending(tmp_path, receiver, relay.address) as sender:
            await whole(sender)
            assert receiver.calls == 1


async def test_short_way_keeps_its_one_connection(large: Path) -> None:
    async with receiving() as (receiver, address), sending(large, receiver, address) as sender:
        await whole(sender)
        assert receiver.calls <= 2


async def test_what_a_lost_further_connection_had_under_way_goes_over_the_others(
    large: Path, relay: CutRelay
) -> None:
    async with receiving() as (receiver, address), sending(large, receiver, address) as sender:
        # The first connection is direct; those that are added pass the relay.
        relay.target = address
        sender.address = relay.address
        relay.cut_after(3 << 20)
        receiver.pause = 0.03
        await whole(sender)
        assert relay.cuts == 1
        assert not sender.task.done()
        # One connection that broke is reason enough to open no more.
        assert receiver.calls < MAX_STREAMS + 1
        assert sum(receiver.blobs.values()) - len(receiver.blobs) < 60


async def test_lost_first_connection_is_the_loss_of_the_node(large: Path, relay: CutRelay) -> None:
    async with receiving() as (receiver, address):
        relay.target = address
        async with sending(large, receiver, relay.address) as sender:
            relay.cut_after(10 << 20)
            sender.want_all()
            with pytest.raises(NodeLostError) as caught:
                await asyncio.wait_for(asyncio.shield(sender.task), 20)
            assert caught.value.connection_broke
            assert sender.uploader.acknowledged_bytes > 0


async def test_little_is_lost_when_a_connection_breaks(large: Path, relay: CutRelay) -> None:
    async with receiving() as (receiver, address):
        relay.target, relay.rate = address, 30e6
        async with sending(large, receiver, relay.address) as sender:
            relay.cut_after(20 << 20)
            sender.want_all()
            await asyncio.wait((sender.task,), timeout=20)
            assert (20 << 20) - receiver.received_bytes <= 3 << 20

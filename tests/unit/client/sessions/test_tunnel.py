"""A tunnel whose node cannot be reached."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import pytest

from offload_client.sessions import tunnel as module
from offload_client.sessions.access import NodeChannel, SessionPlace
from offload_client.sessions.tunnel import Tunnel
from offload_core.errors import GatewayUnreachableError, NodeLostError, SessionGoneError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG = logging.getLogger("test")
PATIENCE = 20.0


class Access:
    """Fails in one way after the other, then for ever in the last one."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures: Sequence[BaseException] = failures
        self.calls = 0

    async def find(self, *, wake: bool) -> SessionPlace:
        failure = self.failures[min(self.calls, len(self.failures) - 1)]
        self.calls += 1
        raise failure

    async def connect(self, place: SessionPlace) -> NodeChannel:
        raise AssertionError(place)

    def give_up(self, channel: NodeChannel) -> None:
        raise AssertionError(channel)


async def test_whatever_fails_is_tried_again() -> None:
    # A cancelled call is no cancelled tunnel.
    access = Access(ValueError("nonsense"), asyncio.CancelledError(), SessionGoneError("it ended"))
    async with asyncio.timeout(PATIENCE), Tunnel(access, "a", LOG) as tunnel:
        assert await tunnel.ended == "it ended"
    assert access.calls == 3


async def test_a_clock_that_is_set_back_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(module, "LEAST_PATIENCE", 0.1)
    access = Access(GatewayUnreachableError("the gateway is away"))
    async with asyncio.timeout(PATIENCE), Tunnel(access, "a", LOG) as tunnel:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 86400)
        with pytest.raises(NodeLostError, match="cannot be reached"):
            await tunnel.engine()
        assert 0 < tunnel.away_seconds < PATIENCE

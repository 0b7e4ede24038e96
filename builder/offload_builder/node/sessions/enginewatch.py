"""How many containers of an engine run, by its events rather than by asking again and again.

An engine is in the hands of its member: it may say as much as it likes, and is heard for no more
than a few hundred kilobytes in a second.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from urllib.parse import quote

import structlog

from offload_core.enginecalls import UnixConnection, call_engine, stream_engine
from offload_core.errors import OffloadError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.sessions.contract import Engine

log = structlog.get_logger(__name__)

AGAIN_SECONDS = 1.0
"""After the stream of events broke."""
GATHER_SECONDS = 0.05
"""Containers often come and go in numbers."""
MAX_LIST = 1 << 20
"""Bytes of a list of containers."""
MANY = 1000
"""Containers that are said to run where the list is longer: one takes about a kilobyte of it."""
BYTES_PER_SECOND = 1 << 18
"""Of events, and of lists: some two hundred containers that come or go, or run."""
_KINDS = ("start", "die", "destroy")
_EVENTS = "/events?filters=" + quote(json.dumps({"type": ["container"], "event": list(_KINDS)}))


async def running_containers(engine: Engine) -> int:
    """Return how many containers run, those that are paused or start again included.

    A list that is too long to be read counts as `MANY`: such an engine is in use.

    Raises:
        OffloadError: the engine does not say.
    """
    return (await _listed(engine))[0]


async def _listed(engine: Engine) -> tuple[int, int]:
    """Return how many containers run, and how many bytes their list has."""
    try:
        reply = await call_engine(
            lambda: UnixConnection.open(engine.socket), "GET", "/containers/json", limit=MAX_LIST
        )
    except UsageError as error:
        log.debug("session.watch.unread", engine_id=engine.engine_id, cause=error.message)
        return MANY, MAX_LIST
    found = reply.json() if reply.status == 200 else None
    if not isinstance(found, list):
        raise OffloadError(f"the docker engine does not list its containers: {reply.message[:300]}")
    return len(found), len(reply.body)


async def watch_containers(engine: Engine, tell: Callable[[int], None]) -> None:
    """Tell how many containers run, now and whenever that changes, until cancelled."""
    while True:
        try:
            await _watch(engine, tell)
        except OffloadError as error:
            # Where the engine is at its end, whoever waits for that ends this.
            log.debug("session.watch.broken", engine_id=engine.engine_id, cause=error.message)
        await asyncio.sleep(AGAIN_SECONDS)


async def _watch(engine: Engine, tell: Callable[[int], None]) -> None:
    changed = asyncio.Event()
    async with stream_engine(lambda: _Paced.open(engine.socket), _EVENTS) as pieces:
        # After the stream is open: nothing between the two is missed.
        counting = asyncio.ensure_future(_count(engine, tell, changed))
        try:
            changed.set()
            async for _ in pieces:
                # Whatever an event says, the list says how things are.
                changed.set()
                if counting.done():
                    break
        finally:
            counting.cancel()
            await asyncio.wait((counting,))
    if not counting.cancelled() and (error := counting.exception()) is not None:
        raise error


async def _count(engine: Engine, tell: Callable[[int], None], changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        count, size = await _listed(engine)
        tell(count)
        await asyncio.sleep(GATHER_SECONDS + size / BYTES_PER_SECOND)


class _Paced(UnixConnection):
    """A connection of which no more than `BYTES_PER_SECOND` are read."""

    _pause = 0.0

    async def receive(self) -> bytes:
        """Return the next bytes, once there has been time for those before."""
        await asyncio.sleep(self._pause)
        data = await super().receive()
        self._pause = len(data) / BYTES_PER_SECOND
        return data

"""How many containers of an engine run, by its events rather than by asking again and again."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import TYPE_CHECKING
from urllib.parse import quote

import structlog

from offload_core.enginecalls import UnixConnection, call_engine, json_lines, stream_engine
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.sessions.contract import Engine

log = structlog.get_logger(__name__)

AGAIN_SECONDS = 1.0
"""After the stream of events broke."""
GATHER_SECONDS = 0.05
"""Containers often come and go in numbers."""
_KINDS = ("start", "die", "destroy")
_EVENTS = "/events?filters=" + quote(json.dumps({"type": ["container"], "event": list(_KINDS)}))


async def running_containers(engine: Engine) -> int:
    """Return how many containers run, those that are paused or start again included.

    Raises:
        OffloadError: the engine does not say.
    """
    reply = await call_engine(lambda: UnixConnection.open(engine.socket), "GET", "/containers/json")
    found = reply.json() if reply.status == 200 else None
    if not isinstance(found, list):
        raise OffloadError(f"the docker engine does not list its containers: {reply.message}")
    return len(found)


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
    async with stream_engine(lambda: UnixConnection.open(engine.socket), _EVENTS) as pieces:
        # After the stream is open: nothing between the two is missed.
        counting = asyncio.ensure_future(_count(engine, tell, changed))
        try:
            changed.set()
            async with aclosing(json_lines(pieces)) as events:  # type: ignore[type-var]
                async for _ in events:
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
        tell(await running_containers(engine))
        await asyncio.sleep(GATHER_SECONDS)

"""Logs and ends of builds on their way to a gateway that is away."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from offload_builder.node import buildlogs
from offload_builder.node.buildlogs import BuildLogs
from offload_builder.node.endedbuilds import EndedBuild, EndedBuilds, EndedRecord
from offload_builder.node.gatewaylink import GatewayLink
from offload_builder.node.imagefiles import ImageFiles
from offload_cache.nodestore import NodeStore
from offload_core.tls import KeyPair
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.node_service_pb2 import Result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DONE = BuildState.BUILD_STATE_SUCCEEDED


@asynccontextmanager
async def ended_build(folder: Path) -> AsyncIterator[tuple[EndedBuilds, EndedBuild]]:
    """Yield a build that a former process has ended."""
    async with NodeStore(folder / "cache") as store:
        kept = EndedBuilds(
            folder / "ended", store, keep_seconds=60.0, keep_builds=10, keep_bytes=1 << 30
        )
        journal = kept.journal("b", "web", "ann")
        journal.finish()
        image = ImageFiles((await store.project("web")).store)
        record = EndedRecord("b", "web", "ann", state=DONE)
        yield kept, EndedBuild(record, Result(), journal, image)
        journal.close()
        kept.close()


async def test_end_reaches_a_gateway_that_was_away_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(buildlogs, "LOG_SECONDS", 0.05)
    state: Any = None  # only asked once there is a connection
    link = GatewayLink("127.0.0.1:1", KeyPair(b"", b"", b""), state)
    logs = BuildLogs(link)
    async with ended_build(tmp_path) as (kept, ended):
        sending = asyncio.ensure_future(logs.send_late(ended, kept))
        await asyncio.sleep(0)
        assert logs.is_sending("b")
        await asyncio.sleep(0.2)
        # It is still sent, but the record may go when its time is over.
        assert not sending.done()
        assert not logs.is_sending("b")
        assert not link._updates
        link._journals["b"][1].set()
        await asyncio.wait_for(sending, 5)
        assert link._updates["b"].state == DONE
        assert not link._journals


async def test_log_that_is_given_up_leaves_nothing_behind(tmp_path):
    state: Any = None
    link = GatewayLink("127.0.0.1:1", KeyPair(b"", b"", b""), state)
    logs = BuildLogs(link)
    async with ended_build(tmp_path) as (kept, ended):
        sending = asyncio.ensure_future(logs.send_late(ended, kept))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await asyncio.sleep(0)
        assert not link._journals
        assert not logs.is_sending("b")

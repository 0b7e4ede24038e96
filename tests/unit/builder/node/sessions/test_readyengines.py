"""Engines that are kept ready, without any real one."""

from __future__ import annotations

import asyncio

import pytest

from offload_builder.node.sessions.engine import host as host_module
from offload_builder.node.sessions.engine.host import EngineHost
from offload_builder.node.sessions.engine.settings import EngineSettings
from offload_core.errors import NodeLostError


class Made:
    def __init__(self) -> None:
        self.engine_id = "e"
        self.ended = asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("error", [NodeLostError("it does not end"), OSError("no such group")])
async def test_engines_are_made_ready_after_one_could_not_be_removed(tmp_path, monkeypatch, error):
    monkeypatch.setattr(host_module, "_AGAIN_SECONDS", 0.0)
    host = EngineHost(EngineSettings(data=tmp_path, ready_min_available_bytes=0), None)
    dead, alive = Made(), Made()
    dead.ended.set_result("it died")
    host._ready.append(dead)

    async def remove(_engine_id):
        host._ready.remove(dead)
        raise error

    async def make(_limits):
        return alive

    monkeypatch.setattr(host, "remove", remove)
    monkeypatch.setattr(host, "_make", make)
    keeping = asyncio.create_task(host._keep_ready())
    async with asyncio.timeout(30):
        while host._ready != [alive]:
            assert not keeping.done(), keeping
            await asyncio.sleep(0)
    keeping.cancel()
    await asyncio.wait((keeping,))

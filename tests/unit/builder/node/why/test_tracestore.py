"""Traces on the disk and in the shared store."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload_builder.node.why.tracestore import TraceStore
from offload_core.errors import CacheUnavailableError
from tests.fixtures.memorystore import MemoryObjectStore
from tests.unit.builder.node.why.test_explain import NOW

if TYPE_CHECKING:
    from pathlib import Path


class Unreachable(MemoryObjectStore):
    """A store that does not take anything for a while."""

    away = True

    async def create_bytes(self, key: str, data: bytes) -> bool:
        if self.away:
            raise CacheUnavailableError("away")
        return await super().create_bytes(key, data)


async def test_any_node_finds_what_one_has_saved(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    await TraceStore("p", tmp_path / "one", objects).save(NOW)
    assert await TraceStore("p", tmp_path / "two", objects).find(NOW.build_id) == NOW
    assert await TraceStore("p", tmp_path / "one", None).find(NOW.build_id) == NOW
    assert await TraceStore("q", tmp_path / "two", objects).find(NOW.build_id) is None
    assert await TraceStore("p", tmp_path / "two", objects).find("../x") is None


async def test_nodes_agree_on_digests_that_say_nothing_of_the_values(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    found = [
        await TraceStore("p", tmp_path / name, objects).argument_digests({"VERSION": "secret"})
        for name in ("one", "two", "one")
    ]
    assert found[0] == found[1] == found[2]
    other = await TraceStore("q", tmp_path / "q", objects).argument_digests({"VERSION": "secret"})
    assert other != found[0]
    data = replace(NOW, arguments=found[0]).to_bytes()
    assert b"secret" not in data


async def test_key_that_nobody_has_confirmed_is_not_kept(tmp_path: Path) -> None:
    objects = Unreachable()
    first = await TraceStore("p", tmp_path / "one", MemoryObjectStore()).argument_digests(
        {"A": "1"}
    )
    late = TraceStore("p", tmp_path / "two", objects)
    alone = await late.argument_digests({"A": "1"})
    assert alone == await late.argument_digests({"A": "1"}) != first
    objects.away = False
    other = await TraceStore("p", tmp_path / "three", objects).argument_digests({"A": "1"})
    assert await late.argument_digests({"A": "1"}) == other != alone

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from offload_cache.keys import entry_key
from offload_cache.presence import BlobState
from offload_core.digest import sha256_digest
from offload_core.errors import UsageError
from tests.fixtures.cachecontent import cache_manifest, manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_cache.nodestore import NodeStore, ProjectCache


async def export(
    node: NodeStore, scope: str, key: str, name: str, layers: tuple[bytes, ...] = (b"l1", b"l2")
) -> None:
    """Publish a manifest whose configuration is `name` and wait until all nodes can read it."""
    cache = await node.project("p")
    for blob in (name.encode(), *layers):
        await cache.store.put_blob(blob)
    body = cache_manifest(name.encode(), layers)
    published = await cache.scopes.publish(scope, key, body, build_id="b", member="ada")
    if node.uploads is not None:
        assert published.publication is not None
        assert await node.uploads.wait_published(published.publication, 10)


async def offered(cache: ProjectCache, scopes: tuple[str, ...], key: str) -> str | None:
    offer = await cache.offers.offer(scopes, key)
    if offer is None:
        return None
    return cache.store.disk.read(offer.entry.config_digest).decode()


async def test_the_own_key_wins_then_the_order_of_scopes_then_the_newest(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        cache = await node.project("p")
        assert await offered(cache, ("branch", "main"), "k") is None
        await export(node, "main", "other", "main-other")
        await export(node, "main", "another", "main-another")
        assert await offered(cache, ("branch", "main"), "k") == "main-another"
        await export(node, "main", "k", "main-k")
        assert await offered(cache, ("branch", "main"), "k") == "main-k"
        await export(node, "branch", "other", "branch-other")
        assert await offered(cache, ("branch", "main"), "k") == "main-k"
        assert await offered(cache, ("branch", "main"), "new") == "branch-other"
        await export(node, "branch", "k", "branch-k")
        assert await offered(cache, ("branch", "main"), "k") == "branch-k"
        assert await offered(cache, (), "k") is None
        assert await offered(cache, ("team",), "k") is None


@pytest.mark.parametrize("key", ["k", "another key"])
async def test_an_empty_node_finds_what_another_published(
    make_node: Callable[..., NodeStore], key: str
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "feature/x", "k", "config")
        cache = await two.project("p")
        offer = await cache.offers.offer(("feature/x",), key)
        assert offer is not None
        assert (offer.listed, offer.withheld) == (2, 0)
        assert not cache.store.disk.has(sha256_digest(b"l1"))


async def test_the_newest_of_local_and_shared_entries_holds(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "main", "k", "first")
        await export(two, "main", "k", "second")
        assert await offered(await one.project("p"), ("main",), "k") == "second"
        assert await offered(await two.project("p"), ("main",), "k") == "second"


async def test_blobs_that_a_read_proved_missing_are_withheld(
    make_node: Callable[..., NodeStore], tmp_path: Path
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "main", "k", "config")
        cache = await two.project("p")
        whole = await cache.offers.offer(("main",), "k")
        assert whole is not None
        await cache.store.presence.note(sha256_digest(b"l1"), BlobState.LOST)
        part = await cache.offers.offer(("main",), "k")
        assert part is not None
        assert (part.listed, part.withheld) == (1, 1)
        assert part.digest == sha256_digest(part.body) != whole.digest
        layers = json.loads(part.body)["layers"]
        assert [layer["digest"] for layer in layers] == [sha256_digest(b"l2")]
        assert json.loads(part.body)["config"] == json.loads(whole.body)["config"]
        await cache.store.presence.note(sha256_digest(b"l2"), BlobState.LOST)
        assert await cache.offers.offer(("main",), "k") is None


async def test_without_the_shared_store_only_blobs_on_disk_are_listed(
    make_node: Callable[..., NodeStore], tmp_path: Path
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "main", "k", "config")
        cache = await two.project("p")
        assert await cache.offers.offer(("main",), "k") is not None
        await cache.store.open_blob(sha256_digest(b"l1"))
        (tmp_path / "shared").rename(tmp_path / "away")
        (tmp_path / "shared").symlink_to(tmp_path / "shared")
        for number in range(3):
            await cache.store.stat_blob(sha256_digest(bytes([number])))
        offer = await cache.offers.offer(("main",), "k")
        assert offer is not None
        assert (offer.listed, offer.withheld) == (1, 1)


async def test_an_entry_that_lies_about_its_name_or_is_damaged_is_ignored(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "evil", "k", "config")
        assert two.objects is not None
        document = await two.objects.read_bytes(entry_key("p", "evil", "k"), max_bytes=10_000)
        await two.objects.write_bytes(entry_key("p", "main", "k"), document)
        await two.objects.write_bytes(entry_key("p", "main", "j"), b"{")
        cache = await two.project("p")
        for key in ("k", "j", "new"):
            assert await cache.offers.offer(("main",), key) is None


async def test_only_cache_manifests_are_published(make_node: Callable[..., NodeStore]) -> None:
    async with make_node(shared=False) as node:
        cache = await node.project("p")
        for body in (b"{}", manifest(b"image", [])):
            with pytest.raises(UsageError):
                await cache.scopes.publish("main", "k", body, build_id="b", member="m")
        body = cache_manifest(b"c", [])
        with pytest.raises(UsageError):
            await cache.scopes.publish("", "k", body, build_id="b", member="m")


async def test_entries_are_known_after_a_restart(make_node: Callable[..., NodeStore]) -> None:
    async with make_node(shared=False) as node:
        await export(node, "main", "k", "config")
    async with make_node(shared=False) as node:
        assert await offered(await node.project("p"), ("main",), "k") == "config"


async def test_parallel_publishers_of_other_keys_do_not_overwrite_each_other(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await asyncio.gather(
            *(export(one, "main", f"k{i}", f"one{i}") for i in range(4)),
            *(export(two, "main", f"k{i}", f"two{i}") for i in range(4, 8)),
        )
        async with make_node("three") as three:
            cache = await three.project("p")
            found = [await offered(cache, ("main",), f"k{i}") for i in range(8)]
            assert found == [f"one{i}" if i < 4 else f"two{i}" for i in range(8)]

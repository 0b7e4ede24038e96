from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from offload_cache.contributions import CacheLayer, Contribution, Writer
from offload_cache.health import StoreHealth
from offload_cache.keys import contribution_key, new_contribution_id
from offload_cache.nodestore import NodeStore
from offload_cache.presence import BlobState
from offload_cache.unify import Limits
from offload_core.digest import sha256_digest
from tests.fixtures.cachecontent import step_config
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.scopes import digests, export, layers, offered

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_cache.nodestore import ProjectCache
    from offload_cache.objectstore import ObjectInfo


async def until_offered(cache: ProjectCache, key: str, expected: set[str] | None) -> None:
    async with asyncio.timeout(10):
        while await offered(cache, ("main",), key) != expected:
            await asyncio.sleep(0.02)


async def test_all_scopes_and_keys_become_one_import(make_node: Callable[..., NodeStore]) -> None:
    async with make_node(shared=False) as node:
        cache = await node.project("p")
        assert await offered(cache, ("branch", "main"), "k") is None
        await export(node, "main", "other", "base", "other")
        both = digests("base", "other")
        assert await offered(cache, ("branch", "main"), "k") == both
        offer = await cache.offers.offer(("branch", "main"), "k")
        assert offer is not None
        assert (offer.own_key, offer.records) == (False, 3)
        await export(node, "branch", "k", "base", "mine")
        await export(node, "secret", "k", "base", "secret")
        offer = await cache.offers.offer(("branch", "main"), "k")
        assert offer is not None
        assert (offer.own_key, offer.records, offer.listed, offer.withheld) == (True, 4, 3, 0)
        assert offer.digest == sha256_digest(offer.body)
        assert json.loads(offer.body)["config"]["digest"] == offer.config_digest
        again = await cache.offers.offer(("branch", "main"), "k")
        assert again is not None
        assert again.body == offer.body
        assert await offered(cache, (), "k") is None
        assert await offered(cache, ("team",), "k") is None


async def test_two_states_of_one_build_do_not_replace_each_other(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        cache = await node.project("p")
        await export(node, "main", "k", "base", "one")
        await offered(cache, ("main",), "k")
        await export(node, "main", "k", "base", "two")
        assert await offered(cache, ("main",), "k") == digests("base", "one", "two")


async def test_the_own_key_stays_when_not_all_fit(make_node: Callable[..., NodeStore]) -> None:
    async with make_node(shared=False, import_limits=Limits(max_records=20)) as node:
        cache = await node.project("p")
        await export(node, "main", "k", *(f"m{i}" for i in range(8)))
        await export(node, "branch", "k", *(f"b{i}" for i in range(8)))
        for number in range(4):
            await export(node, "branch", f"other{number}", *(f"{number}{i}" for i in range(8)))
        offer = await cache.offers.offer(("branch", "main"), "k")
        assert offer is not None
        assert offer.records == 17  # one base
        assert await offered(cache, ("branch", "main"), "k") == digests(
            *(f"{name}{i}" for name in "mb" for i in range(8))
        )


async def test_the_last_used_of_the_others_go_first(make_node: Callable[..., NodeStore]) -> None:
    async with make_node(shared=False, import_limits=Limits(max_records=10)) as node:
        cache = await node.project("p")
        for name in ("old", "older", "new"):
            await export(node, "main", name, *(f"{name}{i}" for i in range(8)))
        assert await offered(cache, ("main",), "k") == digests(*(f"new{i}" for i in range(8)))
        cache.scopes.note_use(["main"], "older")
        async with asyncio.timeout(5):
            while not cache.scopes.last_use("main", "older"):
                await asyncio.sleep(0.01)
        await export(node, "main", "z", "z")
        used = digests(*(f"older{i}" for i in range(8)))
        await until_offered(cache, "another key", used | digests("z"))


async def test_another_builders_whole_result_takes_the_place_of_a_missing_one(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two, make_node("three") as three:
        await export(one, "main", "k", "base", "run", created="2026-01-01")
        await export(two, "main", "j", "base", "run", tag="later", created="2026-01-02")
        cache = await three.project("p")
        first = digests("base", "run")
        assert await offered(cache, ("main",), "k") == first
        await cache.store.presence.note(sha256_digest(b"layer run"), BlobState.LOST)
        assert await offered(cache, ("main",), "k") == digests("base")  # at once
        both = digests("base") | digests("base", "run", tag="later")
        await until_offered(cache, "k", both)
        # After a fault it is so at once.
        await cache.store.presence.note(sha256_digest(b"layer base"), BlobState.LOST)
        later = digests("base", "run", tag="later")
        assert await offered(cache, ("main",), "k", after_fault=True) == later
        for digest in later:
            await cache.store.presence.note(digest, BlobState.LOST)
        assert await offered(cache, ("main",), "k", after_fault=True) is None


async def test_layers_of_other_nodes_are_offered_after_a_quiet_night(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "main", "k", "base", "run")
        cache = await two.project("p")
        assert await offered(cache, ("main",), "k") == digests("base", "run")
        [view] = cache.offers._views.values()
        later = time.time() + 10 * 3600
        monkeypatch.setattr(cache.store.presence, "_clock", lambda: later)
        view.made_at -= 10 * 3600
        assert await offered(cache, ("main",), "k") == digests("base", "run")


async def test_what_another_import_displaces_from_memory_stays_in_this_one(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_node(shared=False) as node:
        await export(node, "main", "k", "one")
        cache = await node.project("p")
        assert await offered(cache, ("main",), "k") == digests("one")
        documents = cache.scopes.documents

        async def displace(scope: str, names: list[str]) -> dict[str, bytes]:
            cache.offers._unifier._parts._parts.clear()
            return await documents(scope, names)

        monkeypatch.setattr(cache.scopes, "documents", displace)
        await export(node, "main", "j", "two")
        await until_offered(cache, "k", digests("one", "two"))


async def test_while_the_shared_store_is_away_what_is_on_disk_is_offered(
    make_node: Callable[..., NodeStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload_cache.offers._REFRESH_SECONDS", 0.1)
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "main", "k", "one", "two")
        cache = await two.project("p")
        assert await offered(cache, ("main",), "k") == digests("one", "two")
        await cache.store.open_blob(sha256_digest(b"layer one"))
        (tmp_path / "shared").rename(tmp_path / "away")
        (tmp_path / "shared").symlink_to(tmp_path / "shared")
        for number in range(3):
            await cache.store.stat_blob(sha256_digest(bytes([number])))
        assert await offered(cache, ("main",), "k") == digests("one")
        (tmp_path / "shared").unlink()
        (tmp_path / "away").rename(tmp_path / "shared")
        await until_offered(cache, "k", digests("one", "two"))


async def test_what_other_nodes_add_and_remove_is_followed(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_cache.offers._REFRESH_SECONDS", 0.1)
    async with make_node("one") as one, make_node("two") as two:
        cache = await two.project("p")
        assert await offered(cache, ("main",), "k") is None
        published = await export(one, "main", "k", "one")
        await until_offered(cache, "k", digests("one"))
        assert one.objects is not None
        name = f"projects/p/contributions/main/{published.contribution.contribution_id}"
        await one.objects.delete(name)
        await until_offered(cache, "k", None)


class SlowStore(DirectoryObjectStore):
    """Lists after a while."""

    delay = 0.0

    async def list_objects(
        self, prefix: str, *, limit: int, start_after: str = "", timeout: float | None = None
    ) -> list[ObjectInfo]:
        await asyncio.sleep(self.delay)
        return await super().list_objects(
            prefix, limit=limit, start_after=start_after, timeout=timeout
        )


@pytest.mark.parametrize(("known", "longest"), [(False, 2.5), (True, 0.6)])
async def test_a_slow_shared_store_delays_a_build_for_a_bounded_time(
    make_node: Callable[..., NodeStore], tmp_path: Path, known: bool, longest: float
) -> None:
    async with make_node("one") as one:
        await export(one, "main", "k", "one")
    store = SlowStore(tmp_path / "shared", health=StoreHealth("the shared directory"))
    if known:
        async with NodeStore(tmp_path / "two", objects=store) as two:
            assert await offered(await two.project("p"), ("main",), "k") == digests("one")
        store = SlowStore(tmp_path / "shared", health=StoreHealth("the shared directory"))
    store.delay = 30.0
    async with NodeStore(tmp_path / "two", objects=store) as two:
        cache = await two.project("p")
        started = time.monotonic()
        assert await offered(cache, ("main",), "k") == (digests("one") if known else None)
        assert time.monotonic() - started < longest


async def test_the_configuration_is_kept_on_disk_and_made_again_when_it_is_lost(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        await export(node, "main", "k", "one")
        cache = await node.project("p")
        offer = await cache.offers.offer(("main",), "k")
        assert offer is not None
        cache.store.disk.blob_path(offer.config_digest).unlink()
        assert await offered(cache, ("main",), "k") == digests("one")


async def test_offers_are_quick_beside_a_hundred_thousand_blobs(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node() as node:
        assert node.objects is not None
        for state in range(50):
            steps = [*(f"s{i}" for i in range(10)), *(f"{state}-{i}" for i in range(18))]
            blobs = layers(*steps)
            created_at = datetime.fromtimestamp(1_700_000_000 + state, UTC)
            contribution = Contribution(
                new_contribution_id(created_at, f"b{state}"),
                "main",
                "k",
                created_at,
                Writer("b", "ada", "member"),
                tuple(CacheLayer(sha256_digest(blob), 10, "m", {}) for blob in blobs),
                step_config(*steps, layers=blobs),
            )
            key = contribution_key("p", "main", contribution.contribution_id)
            await node.objects.write_bytes(key, contribution.to_bytes())
        cache = await node.project("p")
        others = [(sha256_digest(f"blob {i}".encode()), 10) for i in range(100_000)]
        await cache.store.presence.trust(others, since=time.time())
        offer = await cache.offers.offer(("main",), "k")
        assert offer is not None
        assert (offer.records > 850, offer.withheld) == (True, 0)
        times = []
        for _ in range(300):
            started = time.perf_counter()
            await cache.offers.offer(("main",), "k")
            times.append(time.perf_counter() - started)
        times.sort()
        print(f"offer: median {times[150] * 1000:.1f} ms, p99 {times[296] * 1000:.1f} ms")
        assert times[150] < 0.02
        assert times[296] < 0.1  # other tests run on this machine

"""Measuring, pruning and promoting contributions, on real node stores."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from offload_cache.admin import layercache
from offload_cache.admin.layercache import LayerCacheAdmin
from offload_cache.admin.selection import (
    EntryFilter,
    freed_layers,
    measure_scopes,
    select,
)
from offload_cache.admin.summaries import EntrySummary
from offload_cache.contributions import CacheLayer, Contribution, Writer
from offload_cache.keys import contribution_key, kind_prefix, new_contribution_id
from offload_core.digest import sha256_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.nodestore import NodeStore, ProjectCache

NOW = datetime(2026, 6, 1, tzinfo=UTC)
PROJECT = "shop"
MAIN, TOPIC = f"{PROJECT}/main", f"{PROJECT}/topic"


def entry(scope: str, name: str, days: float, **layers: int) -> EntrySummary:
    at = NOW - timedelta(days=days)
    return EntrySummary(scope, name, at, at, Writer(name, "ann", "member"), dict(layers))


OLD = entry(MAIN, "old", 10, base=100, a=10)
NEW = entry(MAIN, "new", 1, base=100, b=20)
SIDE = entry(TOPIC, "side", 5, base=100, c=30)
ALL = [NEW, SIDE, OLD]


def names(found: list[EntrySummary]) -> list[str]:
    return [item.entry_id for item in found]


def test_selection_is_bound_to_the_scope_and_begins_with_the_longest_unused():
    assert names(select(ALL, EntryFilter(MAIN), NOW)) == ["old", "new"]
    assert names(select(ALL, EntryFilter(), NOW)) == ["old", "side", "new"]


def test_only_what_was_unused_for_long_is_selected():
    assert names(select(ALL, EntryFilter(unused_for=timedelta(days=4)), NOW)) == ["old", "side"]


def test_an_age_beyond_all_dates_selects_nothing():
    assert select(ALL, EntryFilter(unused_for=timedelta(days=4_000_000)), NOW) == []


@pytest.mark.parametrize(
    ("keep_bytes", "gone"), [(160, []), (159, ["old"]), (149, ["old", "side"]), (1, None)]
)
def test_so_many_go_that_the_rest_fits(keep_bytes: int, gone: list[str] | None):
    expected = ["old", "side", "new"] if gone is None else gone
    assert names(select(ALL, EntryFilter(keep_bytes=keep_bytes), NOW)) == expected


def test_bound_and_age_limit_each_other():
    wanted = EntryFilter(unused_for=timedelta(days=7), keep_bytes=1)
    assert names(select(ALL, wanted, NOW)) == ["old"]


def test_layers_that_others_name_are_not_freed():
    assert freed_layers(ALL, [OLD]) == {"a": 10}
    assert freed_layers(ALL, [OLD, SIDE], needed={"c"}) == {"a": 10}
    assert freed_layers(ALL, ALL) == {"base": 100, "a": 10, "b": 20, "c": 30}


def test_scopes_are_measured_with_what_only_they_have():
    main, topic = measure_scopes(ALL)
    assert (main.scope, main.layer_bytes, main.own_bytes) == (MAIN, 130, 30)
    assert [item.entry_id for item in main.entries] == ["new", "old"]
    assert (topic.scope, topic.layer_bytes, topic.own_bytes) == (TOPIC, 130, 30)


async def take_in(
    cache: ProjectCache, scope: str, build: str, *layers: bytes, role: str = "member"
) -> tuple[Contribution, int | None]:
    """Add what a build would; return it with its publication."""
    for layer in layers:
        await cache.store.put_blob(layer)
    at = datetime.now(UTC)
    contribution = Contribution(
        contribution_id=new_contribution_id(at, build),
        scope=scope,
        key="k",
        created_at=at,
        writer=Writer(build, "ann", role),
        layers=tuple(CacheLayer(sha256_digest(data), len(data), "t", {}) for data in layers),
        records=b'{"layers":[],"records":[]}',
    )
    return contribution, await cache.scopes.add(contribution)


async def contribute(
    cache: ProjectCache, scope: str, build: str, *layers: bytes, role: str = "member"
) -> Contribution:
    """Add what a build would, and wait until other nodes can read it."""
    contribution, publication = await take_in(cache, scope, build, *layers, role=role)
    if publication is not None:
        assert cache.store.uploads is not None
        assert await cache.store.uploads.wait_published(publication, 10)
    return contribution


async def admin_of(node: NodeStore) -> tuple[ProjectCache, LayerCacheAdmin]:
    cache = await node.project(PROJECT)
    return cache, LayerCacheAdmin(cache.store, cache.scopes, node.in_thread)


async def keys(node: NodeStore, kind: str) -> set[str]:
    assert node.objects is not None
    prefix = kind_prefix(PROJECT, kind)
    found = await node.objects.list_objects(prefix, limit=100)
    return {info.key for info in found}


async def test_dry_run_changes_nothing_and_says_what_would_go(node: NodeStore):
    cache, admin = await admin_of(node)
    added = await contribute(cache, MAIN, "build1", b"base", b"layer")
    pruned = await admin.prune(EntryFilter(MAIN), dry_run=True)
    assert [item.entry_id for item in pruned.entries] == [added.contribution_id]
    assert pruned.freed_bytes == len(b"base") + len(b"layer")
    contents, _ = await admin.measure()
    assert len(contents.entries) == 1
    assert await keys(node, "removed") == set()


async def test_pruned_entry_is_moved_aside_and_no_node_knows_it(
    make_node: Callable[..., NodeStore],
):
    async with make_node("one") as one, make_node("two") as two:
        cache, _ = await admin_of(one)
        other, admin = await admin_of(two)
        added = await contribute(cache, MAIN, "build1", b"base")
        kept = await contribute(cache, TOPIC, "build2", b"base", b"more")
        await other.scopes.refresh(MAIN)
        pruned = await admin.prune(EntryFilter(MAIN))
        assert [item.writer.build_id for item in pruned.entries] == ["build1"]
        assert pruned.freed_bytes == 0
        gone = (PROJECT, MAIN, added.contribution_id)
        assert await keys(one, "removed") == {contribution_key(*gone, "removed")}
        kept_key = contribution_key(PROJECT, TOPIC, kept.contribution_id)
        assert await keys(one, "contributions") == {kept_key}
        assert not other.scopes.members(MAIN)
        # The others hear of it when they are asked for their part.
        _, first = await admin_of(one)
        await first.prune(EntryFilter(MAIN), node_only=True)
        assert not cache.scopes.members(MAIN)


async def test_garbage_shows_what_a_prune_left_for_the_collection(node: NodeStore):
    cache, admin = await admin_of(node)
    await contribute(cache, MAIN, "build1", b"base", b"layer")
    before, _ = await admin.measure()
    await admin.prune(EntryFilter())
    after, collected_at = await admin.measure()
    assert (before.garbage_bytes, after.garbage_bytes) == (0, 9)
    assert before.objects == 3
    assert collected_at is None


async def test_entry_that_waits_for_its_upload_is_not_uploaded_after_its_removal(
    make_node: Callable[..., NodeStore],
):
    async with make_node("one", upload_workers=0) as one:
        cache, admin = await admin_of(one)
        added = await take_in(cache, MAIN, "build1", b"base")
        assert cache.store.uploads is not None
        assert await cache.store.uploads.pending_count(PROJECT) == 2
        pruned = await admin.prune(EntryFilter(MAIN), node_only=True)
        assert [item.entry_id for item in pruned.entries] == [added[0].contribution_id]
        assert added[1] is not None
        assert not await cache.store.uploads.wait_published(added[1], 5)
        assert await cache.store.uploads.pending_count(PROJECT) == 0
        assert not cache.scopes.members(MAIN)


async def test_node_without_a_shared_store_frees_its_disk_at_once(
    make_node: Callable[..., NodeStore],
):
    async with make_node("one", shared=False) as one:
        cache, admin = await admin_of(one)
        await contribute(cache, MAIN, "build1", b"base", b"gone")
        await contribute(cache, TOPIC, "build2", b"base")
        pruned = await admin.prune(EntryFilter(MAIN))
        assert pruned.freed_bytes == len(b"gone")
        assert not cache.store.disk.has(sha256_digest(b"gone"))
        assert cache.store.disk.has(sha256_digest(b"base"))
        contents, _ = await admin.measure()
        assert [item.scope for item in contents.entries] == [TOPIC]


async def test_each_node_promotes_what_only_it_has(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layercache, "PUBLISH_SECONDS", 0.1)
    async with make_node("one") as one, make_node("two") as two:
        cache, admin = await admin_of(one)
        await contribute(cache, TOPIC, "build1", b"base")
        other, admin_two = await admin_of(two)
        for node in (one, two):
            assert node.uploads is not None
            node.uploads._pause_until = float("inf")
        await take_in(other, TOPIC, "build2", b"waits")
        # The first node's copy is not in the store yet when the second one is asked.
        assert (await admin.promote(TOPIC, MAIN)).entries == 1
        assert (await admin_two.promote(TOPIC, MAIN, node_only=True)).entries == 1


async def test_promotion_leaves_untrusted_entries_out_and_is_done_once(
    make_node: Callable[..., NodeStore],
):
    async with make_node("one") as one, make_node("two") as two:
        cache, _ = await admin_of(one)
        await contribute(cache, TOPIC, "build1", b"base")
        await contribute(cache, TOPIC, "build2", b"evil", role="untrusted")
        await contribute(cache, TOPIC, "build3", b"unknown", role="")
        other, admin = await admin_of(two)
        first = await admin.promote(TOPIC, MAIN)
        assert (first.entries, first.refused) == (1, 2)
        again = await admin.promote(TOPIC, MAIN)
        assert (again.entries, again.refused) == (0, 2)
        await cache.scopes.refresh(MAIN)
        (member,) = cache.scopes.members(MAIN)
        copy = await cache.scopes.read(MAIN, member.contribution_id)
        assert copy is not None
        assert (copy.promoted_from, copy.writer.build_id) == (TOPIC, "build1")
        assert len(other.scopes.members(MAIN)) == 1

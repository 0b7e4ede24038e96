from __future__ import annotations

from offload_cache.collection.measure import measure
from offload_cache.collection.removal import RemovalFilter, remove_contributions
from tests.fixtures.datedstore import PROJECT, DatedStore

BASE, APP, DEV = b"b" * 100, b"a" * 10, b"d" * 5


async def filled() -> DatedStore:
    store = DatedStore()
    await store.contribute(BASE, APP, build="b1")
    store.seconds = 50
    await store.contribute(BASE, DEV, scope="shop/dev", build="b2")
    await store.push_image(b"manifest", BASE)
    await store.put_blob(b"garbage")
    return store


async def test_a_project_is_measured_by_scope() -> None:
    found = await measure(await filled(), PROJECT)
    assert found.garbage_bytes == len(b"garbage")
    assert found.live_bytes == 115 + len(b"manifest")
    assert found.image_bytes == 100 + len(b"manifest")
    assert found.images == 1
    assert [(s.scope, s.contributions, s.layer_bytes, s.own_bytes) for s in found.scopes] == [
        ("shop/main", 1, 110, 10),
        ("shop/dev", 1, 105, 5),
    ]
    assert found.scopes[1].writer.build_id == "b2"
    assert found.objects == 8
    assert found.size_bytes > found.live_bytes + found.garbage_bytes


async def test_a_dry_run_says_what_would_go() -> None:
    store = await filled()
    select = RemovalFilter(scopes=frozenset(["shop/dev"]))
    planned = await remove_contributions(store, PROJECT, select, dry_run=True)
    assert planned.freed_bytes == 5
    assert len(store.keys("contributions/")) == 2
    removed = await remove_contributions(store, PROJECT, select)
    assert [root.scope for root in removed.removed] == ["shop/dev"]
    assert len(store.keys("contributions/")) == 1
    assert len(store.keys("removed/")) == 1


async def test_a_removal_may_leave_so_many_bytes_and_what_others_own() -> None:
    store = await filled()
    select = RemovalFilter(keep_bytes=110)
    assert (await remove_contributions(store, PROJECT, select, dry_run=True)).freed_bytes == 10
    everything = RemovalFilter(keep_bytes=0)
    plan = await remove_contributions(store, PROJECT, everything, dry_run=True)
    assert len(plan.removed) == 2
    theirs = RemovalFilter(allowed=lambda root: root.writer.build_id == "b2")
    plan = await remove_contributions(store, PROJECT, theirs, dry_run=True)
    assert [root.scope for root in plan.removed] == ["shop/dev"]

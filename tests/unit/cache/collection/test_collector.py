from __future__ import annotations

import asyncio
from datetime import timedelta

import orjson
import pytest

from offload_cache.collection.collector import Collector
from offload_cache.collection.documents import CondemnedDocument, LeaseDocument
from offload_cache.collection.listing import StoreClock, list_projects
from offload_cache.collection.lock import LOCK_KEY, CollectionLock
from offload_cache.collection.plan import Limits
from offload_cache.collection.readlease import ReadLease
from offload_cache.collection.report import CollectionReport, read_report
from offload_cache.keys import (
    base_key,
    blob_key,
    mount_key,
    named_key,
    pack_key,
    packed_key,
    used_key,
)
from offload_core.digest import sha256_digest
from offload_core.errors import ConfigError
from tests.fixtures.datedstore import NO_LIMITS, PROJECT, START, DatedStore

DAY = 86_400.0


async def collect(store: DatedStore, limits: Limits = NO_LIMITS, pool: int = 0) -> CollectionReport:
    collector = Collector(store, "one", lambda _: limits, pool_keep_bytes=pool, clock=store.clock)
    report = await collector.run()
    assert report is not None
    return report


@pytest.fixture
def store() -> DatedStore:
    return DatedStore()


async def test_only_blobs_that_nothing_names_go_and_only_after_the_grace(store: DatedStore) -> None:
    await store.contribute(b"kept")
    image = await store.push_image(b"manifest", b"layer")
    garbage = await store.put_blob(b"garbage")
    store.seconds = DAY - 1
    report = await collect(store)
    assert report.projects[PROJECT].deleted_blobs == 0
    assert report.projects[PROJECT].garbage_bytes == len(b"garbage")
    store.seconds = DAY + 1
    report = await collect(store)
    assert report.projects[PROJECT].deleted_bytes == len(b"garbage")
    assert report.projects[PROJECT].garbage_bytes == 0
    assert report.projects[PROJECT].live_bytes == len(b"kept" + b"manifest" + b"layer")
    assert await store.stat(blob_key(PROJECT, garbage)) is None
    assert await store.stat(blob_key(PROJECT, image)) is not None
    assert len(store.keys("blobs/")) == 3
    assert store.keys("condemned/") == []


async def test_a_removed_contribution_protects_its_blobs_for_another_grace(
    store: DatedStore,
) -> None:
    await store.contribute(b"layer")
    store.seconds = 10 * DAY
    await collect(store, Limits(0, DAY, 1, 1))
    assert store.keys("contributions/") == []
    assert len(store.keys("removed/")) == 1
    store.seconds += DAY - 10
    await collect(store)
    assert len(store.keys("blobs/")) == 1
    store.seconds += 20
    await collect(store)
    assert store.keys("") == []


async def test_a_mark_of_use_keeps_a_contribution(store: DatedStore) -> None:
    await store.contribute(b"layer", key="app")
    await store.contribute(b"other", key="old", build="b2")
    store.seconds = 5 * DAY
    await store.write_bytes(used_key(PROJECT, "shop/main", "app"), b"")
    store.seconds = 10 * DAY
    await collect(store, Limits(0, 7 * DAY, 1, 1))
    assert len(store.keys("contributions/")) == 1
    assert len(store.keys("removed/")) == 1


async def test_images_go_like_contributions(store: DatedStore) -> None:
    old = await store.push_image(b"old", b"layer")
    store.seconds = 10 * DAY
    new = await store.push_image(b"new", b"layer")
    await collect(store, Limits(0, DAY, 1, 1))
    assert store.keys("images/") == [new[7:]]
    assert store.keys("removed/") == [f"%images/{old[7:]}"]
    store.seconds += 2 * DAY
    await collect(store)
    assert len(store.keys("blobs/")) == 2
    assert store.keys("removed/") == []


async def test_an_image_that_is_being_pushed_again_stays(store: DatedStore) -> None:
    image = await store.push_image(b"old")
    store.seconds = 10 * DAY
    lease = LeaseDocument("two", 3600, frozenset([image]))
    await store.write_bytes(named_key(PROJECT, "leases", "x"), lease.to_bytes())
    await collect(store, Limits(0, DAY, 1, 1))
    assert store.keys("images/") == [image[7:]]


async def test_an_image_that_is_pushed_again_with_more_keeps_all_of_it(store: DatedStore) -> None:
    collector = Collector(store, "one", lambda _: NO_LIMITS, clock=store.clock)
    await store.put_blob(b"layer")
    await store.push_image(b"index")
    assert await collector.run() is not None
    store.seconds = 10.0
    await store.push_image(b"index", b"layer")
    store.seconds = 2 * DAY
    report = await collector.run()
    assert report is not None
    assert report.projects[PROJECT].deleted_blobs == 0
    assert len(store.keys("blobs/")) == 2


async def test_a_project_that_cannot_be_collected_does_not_stop_the_others(
    store: DatedStore,
) -> None:
    endless = LeaseDocument("one", 1e300)
    await store.write_bytes(named_key("a-project", "leases", "x"), endless.to_bytes())
    await store.put_blob(b"garbage")
    store.seconds = 2 * DAY
    report = await collect(store)
    assert report.complete
    assert report.projects["a-project"].problem
    assert report.projects[PROJECT].deleted_blobs == 1
    assert store.keys("") == []


async def test_the_longest_unused_go_until_the_rest_fits(store: DatedStore) -> None:
    for number in range(10):
        store.seconds = number * 10
        await store.contribute(bytes([number]) * 100, key=f"k{number}", build=f"b{number}")
    report = await collect(store, Limits(500, 1e9, 1, 1))
    assert report.projects[PROJECT].removed_entries == 6
    assert report.projects[PROJECT].live_bytes == 400


async def test_the_bound_of_the_pool_takes_from_the_project_that_was_idle_longest(
    store: DatedStore,
) -> None:
    await store.contribute(b"x" * 100)
    store.seconds = 10
    await store.contribute(b"y" * 100)
    # The same in another project, used later.
    for key in list(store.keys("")):
        data = await store.read_bytes(f"projects/{PROJECT}/{key}", max_bytes=10_000)
        store.seconds = 1000
        await store.write_bytes(f"projects/other/{key}", data)
    report = await collect(store, pool=200)
    assert report.projects[PROJECT].live_bytes == 0
    assert report.projects["other"].live_bytes == 100
    assert report.projects["other"].removed_entries == 1


async def test_superseded_contributions_of_a_key_go(store: DatedStore) -> None:
    for number in range(40):
        store.seconds = number
        await store.contribute(b"layer", build=f"b{number}")
    report = await collect(store)
    assert report.projects[PROJECT].removed_entries == 8
    assert len(store.keys("contributions/")) == 32


async def test_leases_of_publications_and_readers_keep_blobs(store: DatedStore) -> None:
    digest = await store.put_blob(b"relied upon")
    removed = await store.contribute(b"being read")
    store.seconds = 10 * DAY
    await collect(store, Limits(0, DAY, 1, 1))
    store.seconds += DAY - 600
    lease = LeaseDocument("two", 3600, frozenset([digest]))
    await store.write_bytes(named_key(PROJECT, "leases", "x"), lease.to_bytes())
    readers = ReadLease(store, "two", clock=store.clock)
    name = (removed.scope, removed.contribution_id)
    with readers.reading(PROJECT, contributions=[name]):
        await readers.refresh()
        store.seconds += 1200
        await collect(store)
        assert len(store.keys("removed/")) == 1
    assert len(store.keys("blobs/")) == 1 + (digest in await held(store))
    await readers.refresh()
    store.seconds += 3600
    await collect(store)
    assert store.keys("") == []


async def held(store: DatedStore) -> set[str]:
    return {f"sha256:{key[-64:]}" for key in store.keys("blobs/")}


async def test_what_crashes_left_goes(store: DatedStore) -> None:
    document = CondemnedDocument("dead", 1800, frozenset([sha256_digest(b"x")]))
    await store.write_bytes(named_key(PROJECT, "condemned", "dead"), document.to_bytes())
    lease = LeaseDocument("dead", 3600)
    await store.write_bytes(named_key(PROJECT, "leases", "dead"), lease.to_bytes())
    await store.write_bytes(packed_key(PROJECT, "shop/gone"), b"")
    await store.write_bytes(used_key(PROJECT, "shop/gone", "app"), b"")
    await store.write_bytes(f"projects/{PROJECT}/scopes/shop%2Fmain/app.json", b"{}")
    store.seconds = 600
    await collect(store)
    assert store.keys("scopes/") == []
    assert len(store.keys("")) == 4
    store.seconds = 2 * DAY
    await collect(store)
    assert store.keys("") == []


async def test_packs_of_projects_that_no_node_has_open_are_bounded(store: DatedStore) -> None:
    for number in range(3):
        name = f"{number:012x}-{number:016x}"
        for kind in ("packs", "index"):
            await store.write_bytes(pack_key(PROJECT, kind, name), bytes(100))
    report = await collect(store, Limits(0, 1e9, 250, 1e9))
    assert report.projects[PROJECT].deleted_packs == 1
    assert len(store.keys("context/")) == 4


async def test_a_document_of_a_later_release_stops_deletions(store: DatedStore) -> None:
    await store.put_blob(b"garbage")
    await store.write_bytes(named_key(PROJECT, "leases", "x"), b'{"version": 9}')
    store.seconds = 10 * DAY
    report = await collect(store)
    assert "version 9" in report.projects[PROJECT].problem
    assert len(store.keys("blobs/")) == 1


async def test_a_damaged_contribution_keeps_nothing(store: DatedStore) -> None:
    document = await store.contribute(b"layer")
    key = f"contributions/shop%2Fmain/{document.contribution_id}"
    assert store.keys(key) == [""]
    await store.write_bytes(f"projects/{PROJECT}/{key}", b"damaged")
    store.seconds = 2 * DAY
    await collect(store)
    assert store.keys("") == []


async def test_projects_are_found_whatever_their_names_sort_like(store: DatedStore) -> None:
    names = ["a", "a-b", "a.b", "a0", "a_b", "b"]
    for name in names:
        await store.write_bytes(f"projects/{name}/blobs/x", b"")
    await store.write_bytes("projects/.bad/blobs/x", b"")
    assert sorted(await list_projects(store)) == names


async def test_one_collector_at_a_time_until_it_falls_silent(store: DatedStore) -> None:
    first = CollectionLock(store, "one", clock=store.clock)
    second = CollectionLock(store, "two", clock=store.clock)

    async def take(lock: CollectionLock) -> bool:
        return await lock.acquire(await StoreClock.read(store, store.clock))

    assert await take(first)
    assert not await take(second)
    store.seconds = 301
    assert not first.held
    assert not await take(second)
    store.seconds = 601
    assert await take(second)
    await first.release()
    assert await store.stat(LOCK_KEY) is not None
    await second.release()
    assert await store.stat(LOCK_KEY) is None


async def test_a_run_tells_the_pool_and_gives_the_lock_back(store: DatedStore) -> None:
    await store.contribute(b"layer")
    report = await collect(store)
    assert await store.stat(LOCK_KEY) is None
    assert await read_report(store) == report
    assert report.at == START
    assert report.by == "one"


async def test_two_runs_at_once_are_one(store: DatedStore) -> None:
    await store.contribute(b"layer")
    collectors = [
        Collector(store, name, lambda _: NO_LIMITS, clock=store.clock) for name in ("one", "two")
    ]
    reports = await asyncio.gather(*(collector.run() for collector in collectors))
    assert sum(report is not None for report in reports) >= 1


def test_a_grace_below_an_hour_is_refused(store: DatedStore) -> None:
    with pytest.raises(ConfigError, match="hour"):
        Collector(store, "one", lambda _: NO_LIMITS, grace_seconds=3599)


def test_reports_survive_the_store() -> None:
    report = CollectionReport(START + timedelta(seconds=1.5), "one", 2.5)
    assert CollectionReport.from_bytes(report.to_bytes()) == report


async def test_a_stored_cache_mount_keeps_its_blobs_until_it_is_old(store: DatedStore) -> None:
    tree, piece = await store.put_blob(b"tree"), await store.put_blob(b"piece")
    key = mount_key(PROJECT, "shop/main", "ab" * 32)

    def document(*digests: str) -> bytes:
        blobs = [{"digest": digest, "size": 5} for digest in digests]
        return orjson.dumps({"version": 1, "build_id": "b1", "node": "one", "blobs": blobs})

    await store.write_bytes(key, document(tree, piece))
    store.seconds = 2 * DAY
    await collect(store)
    assert len(store.keys("blobs/")) == 2
    # It is written over: what the new one does not name goes.
    await store.write_bytes(key, document(tree))
    await collect(store)
    assert len(store.keys("blobs/")) == 1
    store.seconds += 10 * DAY
    report = await collect(store, Limits(0, 7 * DAY, 1, 1))
    assert report.projects[PROJECT].removed_entries == 1
    await collect(store)
    assert store.keys("") == []


async def test_documents_without_blobs_go_by_their_age(store: DatedStore) -> None:
    await store.write_bytes(named_key(PROJECT, "traces", "b1"), b"trace")
    await store.write_bytes(base_key(PROJECT, "docker.io/library/alpine:3"), b"{}")
    store.seconds = 29 * DAY
    await collect(store)
    assert len(store.keys("")) == 2
    store.seconds = 31 * DAY
    await collect(store)
    assert store.keys("") == []

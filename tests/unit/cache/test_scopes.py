from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from offload_cache.contributions import Contribution, Writer
from offload_cache.keys import (
    contribution_key,
    contributions_prefix,
    new_contribution_id,
    packed_key,
    used_prefix,
)
from offload_cache.packed import pack_documents, unpack_documents
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError, UsageError
from tests.fixtures.cachecontent import cache_manifest, manifest, step_config
from tests.fixtures.scopes import digests, export, offered

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.nodestore import NodeStore, ProjectCache

WRITER = Writer("b", "ada", "member")


async def names(cache: ProjectCache, scope: str) -> list[str]:
    await cache.scopes.load([scope])
    return [member.contribution_id for member in cache.scopes.members(scope)]


async def test_a_contribution_is_here_at_once_and_says_who_wrote_it(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        published = await export(node, "main", "k", "one", "two")
        assert published.added
        cache = await node.project("p")
        assert await names(cache, "main") == [published.contribution.contribution_id]
        read = await cache.scopes.read("main", published.contribution.contribution_id)
        assert read is not None
        assert (read.writer.member, read.writer.role) == ("ada", "member")
        assert (read.scope, read.key) == ("main", "k")
        assert {layer.digest for layer in read.layers} == digests("one", "two")
        assert await cache.scopes.scopes() == ["main"]
    async with make_node(shared=False) as node:
        assert await offered(await node.project("p"), ("main",), "k") == digests("one", "two")


async def test_what_adds_nothing_is_not_published_again(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        first = await export(node, "main", "k", "one", "two")
        again = await export(node, "main", "k", "one", "two", created="2026-02-02")
        assert not again.added
        assert again.contribution.contribution_id == first.contribution.contribution_id
        part = await export(node, "main", "k", "one")
        assert not part.added
        assert (await export(node, "main", "other", "one")).added
        assert (await export(node, "branch", "k", "one")).added
        assert (await export(node, "main", "k", "one", "two", "three")).added
        # What was known is not whole any more: a second builder's layers are of use.
        cache = await node.project("p")
        for digest in digests("three"):
            cache.store.disk.blob_path(digest).unlink()
        assert (await export(node, "main", "k", "one", "two", "three", tag="again")).added


async def test_only_cache_manifests_that_buildkit_would_read_are_published(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node(shared=False) as node:
        cache = await node.project("p")
        loop = json.dumps({"records": [{"digest": "x", "inputs": [[{"link": 0}]]}]}).encode()
        for config in (loop, step_config()):
            await cache.store.put_blob(config)
        good = cache_manifest(step_config(), [])
        for body in (b"{}", manifest(b"image", []), cache_manifest(loop, [])):
            with pytest.raises(UsageError):
                await cache.scopes.publish("main", "k", body, writer=WRITER)
        with pytest.raises(UsageError):
            await cache.scopes.publish("", "k", good, writer=WRITER)
        with pytest.raises(UsageError):
            await cache.scopes.publish("main", "k", good, writer=Writer("../b", "ada", "member"))
        with pytest.raises(NotFoundError):
            await cache.scopes.publish("main", "k", cache_manifest(b"{}", []), writer=WRITER)
        await cache.store.put_blob(b"layer")
        lying = json.loads(cache_manifest(step_config(), [b"layer"]))
        lying["layers"][0]["size"] = 99
        with pytest.raises(UsageError, match="wrong about the size"):
            await cache.scopes.publish("main", "k", json.dumps(lying).encode(), writer=WRITER)


async def test_an_empty_node_finds_what_others_published(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await asyncio.gather(
            *(export(one, "main", f"k{i}", f"one{i}") for i in range(4)),
            *(export(two, "main", f"k{i}", f"two{i}") for i in range(4)),
        )
        async with make_node("three") as three:
            cache = await three.project("p")
            offer = await cache.offers.offer(("main",), "k1")
            assert offer is not None
            assert (offer.listed, offer.withheld, offer.own_key) == (8, 0, True)
            assert len(offer.contributions) == 8
            assert not any(map(cache.store.disk.has, digests("one1", "two1")))


async def test_removed_contributions_vanish_but_not_those_that_wait_for_their_upload(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        first = (await export(one, "main", "k", "one")).contribution
        second = (await export(one, "main", "k", "two")).contribution
        cache = await two.project("p")
        assert await offered(cache, ("main",), "k") == digests("one", "two")
        assert two.objects is not None
        await two.objects.delete(contribution_key("p", "main", first.contribution_id))
        assert await cache.scopes.refresh("main")
        assert await names(cache, "main") == [second.contribution_id]
        assert await cache.scopes.refresh("main") is False
        own = await one.project("p")
        await own.scopes.refresh("main")
        assert await names(own, "main") == [second.contribution_id]


async def test_what_waits_for_the_shared_store_is_offered_meanwhile(
    make_node: Callable[..., NodeStore], tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with make_node("one") as one:
        cache = await one.project("p")
        assert one.uploads is not None
        # The directory of contributions is taken: documents cannot be written, listings are empty.
        assert one.objects is not None
        await one.objects.write_bytes("projects/p/contributions", b"")
        published = await export(one, "main", "k", "one", wait=False)
        for _ in range(3):
            await cache.scopes.refresh("main")
            assert await names(cache, "main") == [published.contribution.contribution_id]
            await asyncio.sleep(0.05)


async def test_documents_that_lie_or_are_damaged_are_ignored(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        evil = (await export(one, "evil", "k", "one")).contribution
        good = (await export(one, "main", "k", "two")).contribution
        assert two.objects is not None
        document = await two.objects.read_bytes(
            contribution_key("p", "evil", evil.contribution_id), max_bytes=10_000
        )
        prefix = contributions_prefix("p", "main")
        await two.objects.write_bytes(prefix + evil.contribution_id, document)
        await two.objects.write_bytes(prefix + new_contribution_id(datetime.now(UTC), "x"), b"{")
        await two.objects.write_bytes(prefix + "readme", b"hello")
        cache = await two.project("p")
        assert await offered(cache, ("main",), "k") == digests("two")
        assert await names(cache, "main") == [good.contribution_id]


async def test_many_contributions_are_read_from_the_packed_object(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_cache.scopes._PACK_JITTER_SECONDS", 0.0)
    async with make_node("one") as one:
        made = [(await export(one, "main", "k", f"s{i}")).contribution for i in range(9)]
        cache = await one.project("p")
        await cache.scopes.refresh("main")
        assert one.objects is not None
        async with asyncio.timeout(5):
            while await one.objects.stat(packed_key("p", "main")) is None:
                await asyncio.sleep(0.02)
        # Only the listing says what there is; the content of two comes from the packed object.
        for contribution in made[:2]:
            key = contribution_key("p", "main", contribution.contribution_id)
            await one.objects.write_bytes(key, b"unreadable, but listed")
    async with make_node("two") as two:
        cache = await two.project("p")
        assert await offered(cache, ("main",), "k") == digests(*(f"s{i}" for i in range(9)))
    async with make_node("three") as three:
        assert three.objects is not None
        await three.objects.write_bytes(packed_key("p", "main"), b"damaged")
        cache = await three.project("p")
        assert await offered(cache, ("main",), "k") == digests(*(f"s{i}" for i in range(2, 9)))


def test_packed_objects_hold_what_fits_and_refuse_damage() -> None:
    documents = [("a", b"1" * 10), ("b", b"2" * (15 << 20)), ("c", b"3" * (2 << 20))]
    packed = pack_documents(documents)
    assert unpack_documents(packed) == dict(documents[:2])
    assert unpack_documents(pack_documents([])) == {}
    for damaged in (b"", packed[:5], packed[:40], packed[:-1], b"x" + packed):
        with pytest.raises(UsageError):
            unpack_documents(damaged)


async def test_uses_are_marked_once_a_day_and_read_by_others(
    make_node: Callable[..., NodeStore],
) -> None:
    async with make_node("one") as one, make_node("two") as two:
        await export(one, "main", "a/b", "one")
        cache = await one.project("p")
        assert one.objects is not None
        for _ in range(2):
            cache.scopes.note_use(["main", "other"], "a/b")
            cache.scopes.note_use(["main"], "unknown")
        async with asyncio.timeout(5):
            while not cache.scopes.last_use("main", "a/b"):
                await asyncio.sleep(0.01)
        marks = await one.objects.list_objects("projects/p/used/", limit=10)
        assert [mark.key for mark in marks] == [used_prefix("p", "main") + "a%2Fb"]
        await one.objects.delete(marks[0].key)
        cache.scopes.note_use(["main"], "a/b")
        await asyncio.sleep(0.05)
        assert await one.objects.list_objects("projects/p/used/", limit=10) == []
        await one.objects.write_bytes(marks[0].key, b"")
        other = await two.project("p")
        await other.scopes.refresh("main")
        assert other.scopes.last_use("main", "a/b") > 0


async def test_a_scope_keeps_its_newest_two_hundred(make_node: Callable[..., NodeStore]) -> None:
    async with make_node("one") as one, make_node("two") as two:
        cache = await one.project("p")
        assert one.objects is not None
        stored = []
        for number in range(205):
            created_at = datetime.fromtimestamp(1_700_000_000 + number, UTC)
            name = new_contribution_id(created_at, f"b{number}")
            contribution = Contribution(
                name, "main", "k", created_at, WRITER, (), step_config(f"s{number}")
            )
            await one.objects.write_bytes(
                contribution_key("p", "main", name), contribution.to_bytes()
            )
            stored.append(name)
        newest = stored[::-1][:200]
        await cache.scopes.refresh("main")
        assert await names(cache, "main") == newest
        await cache.scopes.remove("main", newest[:2])
        assert await names(cache, "main") == newest[2:]
        assert two.objects is not None


async def store_old(node: NodeStore, scope: str, first: int, count: int) -> list[str]:
    """Write contributions as other nodes do, and return their names, newest first."""
    assert node.objects is not None
    stored = []
    for number in range(first, first + count):
        created_at = datetime.fromtimestamp(1_700_000_000 + number, UTC)
        name = new_contribution_id(created_at, f"b{number}")
        contribution = Contribution(
            name, scope, "k", created_at, WRITER, (), step_config(f"s{number}")
        )
        await node.objects.write_bytes(contribution_key("p", scope, name), contribution.to_bytes())
        stored.append(name)
    return stored[::-1]


def count_reads(node: NodeStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the keys of all small objects that a node reads from now on."""
    objects = node.objects
    assert objects is not None
    keys: list[str] = []
    read_bytes = objects.read_bytes

    async def read(key: str, *, max_bytes: int, timeout: float | None = None) -> bytes:
        keys.append(key)
        return await read_bytes(key, max_bytes=max_bytes, timeout=timeout)

    monkeypatch.setattr(objects, "read_bytes", read)
    return keys


async def test_a_document_of_no_use_is_not_read_at_each_listing(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_node("one") as one:
        [good] = await store_old(one, "main", 0, 1)
        assert one.objects is not None
        bad = new_contribution_id(datetime.now(UTC), "x")
        await one.objects.write_bytes(contribution_key("p", "main", bad), b"of a later release")
        cache = await one.project("p")
        read = count_reads(one, monkeypatch)
        for _ in range(3):
            await cache.scopes.refresh("main")
        assert await names(cache, "main") == [good]
        assert sorted(read) == sorted(contribution_key("p", "main", name) for name in (good, bad))


async def test_a_full_scope_with_uploads_under_way_is_not_read_at_each_listing(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_cache.scopes._PACK_JITTER_SECONDS", 600.0)
    async with make_node("one") as one:
        stored = await store_old(one, "main", 0, 200)
        cache = await one.project("p")
        await cache.scopes.refresh("main")
        assert one.uploads is not None
        monkeypatch.setattr(one.uploads, "_pause_until", 1e9)
        mine = await export(one, "main", "k", "mine", wait=False)
        read = count_reads(one, monkeypatch)
        for _ in range(2):
            await cache.scopes.refresh("main")
        assert await names(cache, "main") == [mine.contribution.contribution_id, *stored[:199]]
        assert [key for key in read if "/contributions/" in key] == []


async def test_scopes_that_builds_follow_stay_when_a_project_has_too_many(
    make_node: Callable[..., NodeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_cache.scopetable._MAX_PER_PROJECT", 6)
    async with make_node("one") as one:
        release = await store_old(one, "release", 0, 2)
        base = await store_old(one, "base", 10, 2)
        newer = {f"f{n}": await store_old(one, f"f{n}", 100 + 10 * n, 2) for n in range(3)}
        cache = await one.project("p")
        for scope in (*newer, "release", "base"):
            await cache.scopes.refresh(scope)
        read = count_reads(one, monkeypatch)
        for scope in ("release", "base", "release", "base"):
            assert not await cache.scopes.refresh(scope)
        assert read == []
        assert await names(cache, "release") == release
        assert await names(cache, "base") == base
        assert await cache.scopes.scopes() == ["base", "f2", "release"]


def test_layers_have_the_digests_that_tests_expect() -> None:
    assert digests("one") == {sha256_digest(b"layer one")}

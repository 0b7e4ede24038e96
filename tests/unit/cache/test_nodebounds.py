"""Bounds of all projects of a node together."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from offload_cache.nodebounds import NodeBounds
from offload_core.digest import sha256_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_cache.diskstore import DiskStore
    from offload_cache.nodestore import NodeStore


def aged(disk: DiskStore, data: bytes, seconds: float) -> str:
    """Store a blob that was last used so long ago."""
    digest = disk.put(data)
    path = disk.blob_path(digest)
    at = time.time() - seconds
    os.utime(path, (at, at))
    return digest


async def test_longest_unused_of_all_projects_goes_also_of_one_that_is_not_open(
    make_node: Callable[..., NodeStore],
):
    async with make_node(shared=False) as before:
        disk = (await before.project("closed")).store.disk
        oldest, newest = aged(disk, b"o" * 100, 5000), aged(disk, b"n" * 100, 100)
    async with make_node(shared=False) as node:
        mine = (await node.project("open")).store.disk
        middle, young = aged(mine, b"m" * 100, 3000), aged(mine, b"y" * 100, 50)
        result = await NodeBounds(node, keep_bytes=250).enforce()
        assert (result.removed_blobs, result.used_bytes) == (2, 200)
        assert not mine.has(middle)
        assert mine.has(young)
        assert mine.used_bytes == 100
        assert "closed" not in node.opened()
        closed = (await node.project("closed")).store.disk
        assert (closed.has(oldest), closed.has(newest)) == (False, True)


async def test_leased_and_waiting_blobs_stay(make_node: Callable[..., NodeStore]):
    async with make_node(shared=False) as node:
        disk = (await node.project("open")).store.disk
        held, free = aged(disk, b"h" * 100, 5000), aged(disk, b"f" * 100, 100)
        with disk.lease([held]):
            await NodeBounds(node, keep_bytes=150).enforce()
            assert (disk.has(held), disk.has(free)) == (True, False)
            await NodeBounds(node, keep_bytes=50).enforce()
            assert disk.has(held)
    async with make_node("two", upload_workers=0) as node:
        cache = await node.project("open")
        disk = cache.store.disk
        waiting, free = aged(disk, b"w" * 100, 5000), aged(disk, b"f" * 100, 100)
        await cache.store.publish("name", [[waiting]])
        await NodeBounds(node, keep_bytes=150, idle_seconds=60).enforce()
        assert (disk.has(waiting), disk.has(free)) == (True, False)


async def test_blobs_that_nobody_used_for_long_go(make_node: Callable[..., NodeStore]):
    async with make_node(shared=False) as node:
        disk = (await node.project("open")).store.disk
        old, young = aged(disk, b"o", 7200), aged(disk, b"y", 60)
        result = await NodeBounds(node, idle_seconds=3600).enforce()
        assert result.removed_blobs == 1
        assert (disk.has(old), disk.has(young)) == (False, True)


async def test_project_that_is_not_open_keeps_its_own_bound(make_node: Callable[..., NodeStore]):
    async with make_node(shared=False) as before:
        disk = (await before.project("closed")).store.disk
        for number in range(10):
            aged(disk, b"%d" % number * 100, 1000 - number)
    async with make_node(shared=False) as node:
        node.set_bounds({"closed": 500})
        bounds = NodeBounds(node)
        assert await bounds.used_bytes("closed") == 1000
        assert (await bounds.enforce()).used_bytes <= 500
        assert await bounds.used_bytes("closed") <= 500
        newest = sha256_digest(b"9" * 100)
        assert (await node.project("closed")).store.disk.has(newest)


async def test_changed_bound_of_an_open_project_holds_at_once(make_node: Callable[..., NodeStore]):
    async with make_node(shared=False) as node:
        cache = await node.project("open")
        for number in range(4):
            aged(cache.store.disk, b"%d" % number * 100, 100 - number)
        node.set_bounds({"open": 250})
        await cache.store.trim()
        assert cache.store.disk.used_bytes <= 250
        node.set_bounds({})
        assert cache.store.disk.max_bytes is None


async def test_blob_that_was_used_after_it_was_chosen_stays(make_node: Callable[..., NodeStore]):
    async with make_node(shared=False) as node:
        disk = (await node.project("open")).store.disk
        digest = aged(disk, b"x", 5000)
        (chosen,) = disk.blobs()
        assert disk.find(digest) is not None
        assert disk.delete_unused(digest, chosen.used_at) == 0
        assert disk.has(digest)

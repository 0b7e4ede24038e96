"""Large and many: what the session tunnel must carry."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from offload_builder.buildkit import SessionProviders, SolveResult, StatRun
from offload_builder.buildkit.statframes import stat_frames
from offload_core.listing import Page
from tests.fixtures.buildkit import (
    MemorySource,
    MemoryTree,
    build,
    dockerfile_source,
    running_daemon,
)
from tests.fixtures.listings import file


@pytest.fixture
async def client():
    async with running_daemon() as daemon:
        yield daemon.client


def size_in(records) -> int:
    return sum(record.size_bytes for record in records if record.kind == "source.local")


async def test_twenty_thousand_small_files(client):
    files = {f"d{n // 100:03}/f{n % 100:03}": b"%d" % n * 50 for n in range(20_000)}
    source = dockerfile_source("FROM scratch\nCOPY . /\n", files)
    began = time.monotonic()
    result = await build(client, SessionProviders(source=source))
    assert isinstance(result, SolveResult)
    assert time.monotonic() - began < 60
    announced = source.served[-1].announced
    assert sum(map(len, announced)) == 20_001
    assert len(announced) < 5000
    # Nothing is asked for again.
    result = await build(client, SessionProviders(source=source))
    assert isinstance(result, SolveResult)
    assert source.served[-1].announced == []


async def test_a_large_file(client):
    class Tree(MemoryTree):
        def run(self, start, end):
            page = Page(["big"], [0o644], [512 * 2**20], b"")
            return StatRun(stat_frames(page, [1]), 1)

        def content_size(self, index):
            return 512 * 2**20

        async def read(self, index):
            block = os.urandom(2**20)
            for _ in range(512):
                yield block

    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            if name == "context" and follow != [".dockerignore"]:
                return Tree({"big": file(b"")})
            return await super().open(name, include, exclude, follow)

    source = Source({"dockerfile": {"Dockerfile": b"FROM scratch\nCOPY big /\n"}, "context": {}})
    result = await build(client, SessionProviders(source=source))
    assert isinstance(result, SolveResult)
    # BuildKit lets go of its copy, and measures it, a moment after the build.
    async with asyncio.timeout(20):
        while size_in(await client.disk_usage()) <= 512 * 2**20:
            await asyncio.sleep(0.1)


async def test_three_thousand_lines_of_dockerignore(client):
    lines = [f"generated/artefact-number-{n}/**" for n in range(2999)] + ["ünï/*"]
    source = dockerfile_source(
        "FROM scratch\nCOPY . /\n", {".dockerignore": "\n".join(lines).encode(), "kept": b"x"}
    )
    result = await build(client, SessionProviders(source=source))
    assert isinstance(result, SolveResult)
    name, include, exclude, _ = source.opened[-1]
    assert (name, include) == ("context", [])
    assert exclude == lines


async def test_files_that_arrive_late_do_not_hold_up_the_others(client):
    arrived = asyncio.Event()
    read: list[int] = []

    class Tree(MemoryTree):
        async def read(self, index):
            path = self.paths[index]
            if path == "a-late":
                await asyncio.wait_for(arrived.wait(), 20)
            read.append(index)
            if len(read) == 25:  # the other half was at hand
                arrived.set()
            yield self.tree[path].content

    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            tree = await super().open(name, include, exclude, follow)
            return tree if name == "dockerfile" else Tree(tree.tree)

    files = {"a-late": b"late", **{f"b{n:02}": b"x" for n in range(50)}}
    source = Source({"dockerfile": {"Dockerfile": b"FROM scratch\nCOPY . /\n"}, "context": files})
    result = await build(client, SessionProviders(source=source))
    assert isinstance(result, SolveResult)
    assert read[-1] == 0 or arrived.is_set()


async def test_listing_and_requests_overlap(client):
    first_request = asyncio.Event()

    class Tree(MemoryTree):
        async def runs(self):
            yield self.run(0, 1)
            # BuildKit asks for the first file before it has heard of the second.
            await asyncio.wait_for(first_request.wait(), 20)
            yield self.run(1, 3)

        async def requested(self, indexes):
            first_request.set()

    class Source(MemorySource):
        async def open(self, name, include, exclude, follow):
            tree = await super().open(name, include, exclude, follow)
            if name == "dockerfile" or follow == [".dockerignore"]:
                return tree
            return Tree(tree.tree)

    source = Source(
        {
            "dockerfile": {"Dockerfile": b"FROM scratch\nCOPY . /\n"},
            "context": {"a": b"1", "b": b"2", "c": b"3"},
        }
    )
    assert isinstance(await build(client, SessionProviders(source=source)), SolveResult)


async def test_parallel_builds_share_the_daemon(client):
    async def one(number: int):
        source = dockerfile_source(
            "FROM scratch\nCOPY . /\n", {f"f{n}": b"%d" % number * 1000 for n in range(300)}
        )
        return await build(client, SessionProviders(source=source), shared_key=f"k{number}")

    results = await asyncio.gather(*(one(number) for number in range(6)))
    assert all(isinstance(result, SolveResult) for result in results)

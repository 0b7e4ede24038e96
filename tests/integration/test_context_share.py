"""Nodes share the content of build contexts through a real MinIO."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from offload_builder.node.config import NodeConfig
from offload_builder.node.place import Place
from offload_builder.node.projectpool import ProjectPool
from offload_builder.node.registries import Bases
from offload_builder.node.trustdomain import TrustDomain
from offload_cache.collection.collector import Collector
from offload_cache.collection.plan import Limits
from offload_cache.keys import pack_prefix
from offload_cache.nodestore import NodeStore
from offload_cache.s3store import S3Config, S3Store
from tests.fixtures.minio import MinioServer
from tests.fixtures.packs import Blobs, contents, fetch_all, sharing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from offload_builder.node.contextshare import SharedContext
    from offload_cache.mirror.judging import Judge
    from offload_cache.tiered import ProjectStore

SHARED_SECONDS = 30.0
MISS_SECONDS = 4.0
"""Bound of a question to a store that does not answer: 1.5 s, and a loaded machine."""
FETCH_SECONDS = 20.0


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    with MinioServer(tmp_path_factory.mktemp("minio")) as server:
        yield server


class Pool:
    """Nodes that share a bucket; each has its own disk and connection."""

    def __init__(self, minio: MinioServer, root: Path) -> None:
        self.minio = minio
        self.root = root
        self.prefix = os.urandom(4).hex()

    def store(self, *, port: int | None = None, secret: str | None = None) -> S3Store:
        return S3Store(
            S3Config(
                f"http://127.0.0.1:{port or self.minio.port}",
                "contexts",
                self.minio.access_key,
                secret or self.minio.secret_key,
                prefix=self.prefix,
                connect_seconds=1,
                read_seconds=3,
            )
        )

    @asynccontextmanager
    async def node(
        self,
        name: str,
        blobs: Blobs | None = None,
        *,
        port: int | None = None,
        secret: str | None = None,
        **options: Any,
    ) -> AsyncIterator[SharedContext]:
        async with AsyncExitStack() as stack:
            objects = self.store(port=port, secret=secret)
            stack.push_async_callback(objects.close)
            yield await stack.enter_async_context(
                sharing(objects, self.root / name, blobs or Blobs(), **options)
            )

    async def keys(self, kind: str, project_id: str = "web") -> list[str]:
        store = self.store()
        try:
            found = await store.list_objects(pack_prefix(project_id, kind), limit=10_000)
        finally:
            await store.close()
        return [info.key for info in found]

    async def change(self, key: str, data: bytes | None) -> None:
        """Overwrite an object, or remove it."""
        store = self.store()
        try:
            if data is None:
                await store.delete(key)
            else:
                await store.write_bytes(key, data)
        finally:
            await store.close()

    async def collect(self, *, keep_bytes: int = 1 << 30, idle_seconds: float = 1e6) -> None:
        """Do what one node of the pool does from time to time."""
        limits = Limits(0, 1e6, keep_bytes, idle_seconds)
        store = self.store()
        try:
            assert await Collector(store, "one", lambda _: limits).run() is not None
        finally:
            await store.close()

    async def read(self, key: str) -> bytes:
        store = self.store()
        try:
            return await store.read_bytes(key, max_bytes=1 << 30)
        finally:
            await store.close()


@pytest.fixture
def pool(minio: MinioServer, tmp_path: Path) -> Pool:
    return Pool(minio, tmp_path)


async def share(pool: Pool, blobs: Blobs, digests: list[bytes], name: str = "one") -> None:
    """Let a node pack and store blobs."""
    async with pool.node(name, blobs) as node:
        node.added(digests)
        assert await node.wait_shared(SHARED_SECONDS)


# -- what it is for


async def test_what_one_node_was_sent_another_node_has(pool: Pool) -> None:
    blobs = Blobs()
    digests = [*blobs.make(300, 20_000), *blobs.make(2, 6 << 20, seed=1)]
    async with pool.node("one", blobs) as one, pool.node("two") as two:
        assert await two.find(digests) == set()
        one.added(digests)
        assert await one.wait_shared(SHARED_SECONDS)
        await asyncio.sleep(2.1)  # the store is asked for news every two seconds
        stranger = os.urandom(32)
        assert await two.find([*digests, stranger]) == set(digests)
        assert await fetch_all(two, [*digests, stranger]) == contents(blobs, digests)
        assert await fetch_all(two, digests[7:9]) == contents(blobs, digests[7:9])


async def test_twenty_thousand_small_files_and_some_large_ones(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(20_000, 300)
    digests[5_000:5_000] = [blobs.put(os.urandom(8 << 20)) for _ in range(4)]
    await share(pool, blobs, digests)
    assert len(await pool.keys("packs")) <= 3
    async with pool.node("two") as two:
        started = time.monotonic()
        found = await two.find(digests)
        assert found == set(digests)
        assert await fetch_all(two, found) == contents(blobs, digests)
        assert time.monotonic() - started < FETCH_SECONDS


async def test_content_is_shared_soon_after_the_upload_and_not_while_it_lasts(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(40, 1000)
    async with pool.node("one", blobs) as one:
        for digest in digests:
            one.added([digest])
            await asyncio.sleep(0.05)
        assert blobs.reads == 0
        assert await one.wait_shared(SHARED_SECONDS)
    assert len(await pool.keys("packs")) == 1, "one pack for all of an upload"


async def test_nothing_is_packed_while_builds_run(pool: Pool) -> None:
    blobs = Blobs()
    async with pool.node("one", blobs, busy=True) as one:
        one.added(blobs.make(10, 1000))
        assert not await one.wait_shared(3)
        assert blobs.reads == 0
    assert len(await pool.keys("index")) == 1, "a node that stops shares what it has"


async def test_what_a_pack_has_is_not_packed_again(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(50, 1000)
    await share(pool, blobs, digests)
    async with pool.node("two", blobs) as two:
        two.added(digests + digests)
        assert await two.wait_shared(SHARED_SECONDS)
        assert len(await pool.keys("packs")) == 1
        more = blobs.make(1, 1000, seed=2)
        two.added(digests + more)
        assert await two.wait_shared(SHARED_SECONDS)
    indexes = await pool.keys("index")
    assert len(indexes) == 2
    assert len(await pool.read(indexes[1])) < 200


async def test_two_nodes_that_pack_at_once_do_not_disturb_each_other(pool: Pool) -> None:
    mine, yours = Blobs(), Blobs()
    both = mine.make(200, 10_000)
    yours.make(200, 10_000)
    first, second = mine.make(100, 10_000, seed=1), yours.make(100, 10_000, seed=2)
    async with (
        pool.node("one", mine) as one,
        pool.node("two", yours) as two,
        pool.node("three") as three,
    ):
        one.added(both + first)
        two.added(both + second)
        assert await one.wait_shared(SHARED_SECONDS)
        assert await two.wait_shared(SHARED_SECONDS)
        everything = both + first + second
        assert await three.find(everything) == set(everything)
        wanted = contents(mine, both + first) | contents(yours, second)
        assert await fetch_all(three, everything) == wanted


async def test_a_project_sees_nothing_of_another(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(20, 1000)
    await share(pool, blobs, digests)
    async with pool.node("two", project_id="web2") as other:
        assert await other.find(digests) == set()
        assert await fetch_all(other, digests) == {}
    assert await pool.keys("index", "web2") == []
    assert all("/web/context/" in f"/{key}" for key in await pool.keys("packs"))


# -- stops and starts


async def test_a_restarted_node_knows_what_it_knew(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(100, 1000)
    await share(pool, blobs, digests)
    for attempt in range(2):
        async with pool.node("two") as two:
            assert await two.find(digests) == set(digests)
            if attempt:
                assert await fetch_all(two, digests) == contents(blobs, digests)


async def test_what_could_not_be_shared_before_a_stop_is_shared_after_it(
    tmp_path: Path,
) -> None:
    blobs = Blobs()
    digests = blobs.make(30, 1000)
    with MinioServer(tmp_path) as server:
        pool = Pool(server, tmp_path)
        async with pool.node("one", blobs) as one:
            server.stop()
            one.added(digests)
            assert not await one.wait_shared(15)
        server.start()
        async with pool.node("one", blobs) as one:
            assert await one.wait_shared(SHARED_SECONDS)
        async with pool.node("two") as two:
            assert await two.find(digests) == set(digests)


async def test_blobs_that_are_gone_or_damaged_on_disk_are_not_shared(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(10, 1000)
    del blobs.content[digests[3]]
    blobs.content[digests[5]] = b"damaged"
    await share(pool, blobs, digests)
    good = [digest for number, digest in enumerate(digests) if number not in (3, 5)]
    async with pool.node("two") as two:
        assert await two.find(digests) == set(good)


# -- damage


async def test_a_pack_that_is_gone_is_a_miss_and_then_forgotten(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(20, 1000)
    await share(pool, blobs, digests)
    async with pool.node("two", blobs) as two:
        assert await two.find(digests) == set(digests)
        await pool.change((await pool.keys("packs"))[0], None)
        assert await fetch_all(two, digests) == {}
        assert await two.find(digests) == set()
        two.added(digests)  # the client has sent them
        assert await two.wait_shared(SHARED_SECONDS)
    async with pool.node("two") as two:
        assert await fetch_all(two, digests) == contents(blobs, digests)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "one byte"])
async def test_a_damaged_pack_is_a_miss_and_its_whole_neighbour_is_read(
    pool: Pool, damage: str
) -> None:
    blobs = Blobs()
    digests, good = blobs.make(20, 100_000), blobs.make(20, 1000, seed=1)
    await share(pool, blobs, digests)
    (key,) = await pool.keys("packs")
    data = bytearray(await pool.read(key))
    await share(pool, blobs, good)
    if damage == "truncated":
        data = data[: len(data) // 3]
    elif damage == "empty":
        data = bytearray()
    elif damage == "noise":
        data = bytearray(os.urandom(len(data)))
    else:
        data[len(data) // 2] ^= 1
    await pool.change(key, bytes(data))
    async with pool.node("two") as two:
        assert await two.find(digests + good) == {*digests, *good}
        found = await fetch_all(two, digests + good)
        assert contents(blobs, good).items() <= found.items()
        assert len(found) < 40
        assert found.items() <= contents(blobs, digests + good).items()
        assert await two.find(digests + good) == set(good)
        assert two.available, "damage of content says nothing about the store"
    async with pool.node("two") as two:
        assert await two.find(digests + good) == set(good)


@pytest.mark.parametrize("data", [b"", b"noise", bytes(1000)])
async def test_a_damaged_index_hides_its_pack_only(pool: Pool, data: bytes) -> None:
    blobs = Blobs()
    digests, good = blobs.make(5, 1000), blobs.make(5, 1000, seed=1)
    await share(pool, blobs, digests)
    await pool.change((await pool.keys("index"))[0], data)
    await pool.change(pack_prefix("web", "index") + "a strange object", b"?")
    await share(pool, blobs, good, "three")
    async with pool.node("two") as two:
        assert await two.find(digests + good) == set(good)


# -- a store that does not work


async def test_a_store_that_is_down_is_a_miss(tmp_path: Path) -> None:
    blobs = Blobs()
    digests = blobs.make(50, 1000)
    with MinioServer(tmp_path) as server:
        pool = Pool(server, tmp_path)
        await share(pool, blobs, digests)
        async with pool.node("two", blobs) as two:
            assert await two.find(digests[:40]) == set(digests[:40])
            server.stop()
            started = time.monotonic()
            await two.find([*digests, os.urandom(32)])
            assert time.monotonic() - started < MISS_SECONDS
            assert await fetch_all(two, digests) == {}
            two.added(blobs.make(5, 1000, seed=1))
            assert time.monotonic() - started < FETCH_SECONDS


async def test_a_store_that_refuses_us_is_a_miss(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(10, 1000)
    await share(pool, blobs, digests)
    async with pool.node("two", blobs, secret="wrong") as two:
        two.added(digests)
        started = time.monotonic()
        for _ in range(5):
            assert await two.find(digests) == set()
            assert await fetch_all(two, digests) == {}
        assert time.monotonic() - started < MISS_SECONDS


class Line:
    """A line to the store that can fall silent without being cut."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self) -> None:
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            await asyncio.gather(self._pass(reader, up_writer), self._pass(up_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            up_writer.close()
            writer.close()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


async def test_a_store_that_falls_silent_is_a_miss_within_bounds(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(40, 1 << 20)
    await share(pool, blobs, digests)
    async with Line(pool.minio.port) as line, pool.node("two", blobs, port=line.port) as two:
        assert await two.find(digests) == set(digests)
        started = time.monotonic()
        found: list[bytes] = []
        async with aclosing(two.fetch(digests)) as groups:
            async for group in groups:
                found += [digest for digest, _ in group]
                line.silence()
        assert len(found) < 40
        assert time.monotonic() - started < FETCH_SECONDS
        again = time.monotonic()
        for _ in range(10):
            await two.find([os.urandom(32)])
            await fetch_all(two, digests)
        assert time.monotonic() - again < MISS_SECONDS, "the next builds do not wait again"
        line.resume()


async def test_builds_do_not_wait_long_for_news_of_a_silent_store(pool: Pool) -> None:
    async with Line(pool.minio.port) as line, pool.node("two", port=line.port) as two:
        line.silence()
        started = time.monotonic()
        results = await asyncio.gather(*(two.find([os.urandom(32)]) for _ in range(20)))
        assert time.monotonic() - started < MISS_SECONDS
        assert results == [set()] * 20
        again = time.monotonic()
        assert await two.find([os.urandom(32)]) == set()
        assert time.monotonic() - again < 0.5
        line.resume()


async def test_a_slow_taker_is_no_silence(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(30, 1 << 20)
    await share(pool, blobs, digests)
    async with pool.node("two") as two:
        found: dict[bytes, bytes] = {}
        assert await two.find(digests) == set(digests)
        async with aclosing(two.fetch(digests)) as groups:
            async for group in groups:
                if not found:
                    await asyncio.sleep(7)
                found |= dict(group)
        assert found == contents(blobs, digests)


async def test_a_fetch_that_is_left_early_leaves_nothing_behind(pool: Pool) -> None:
    blobs = Blobs()
    digests = blobs.make(30, 1 << 20)
    await share(pool, blobs, digests)
    async with pool.node("two") as two:
        assert await two.find(digests) == set(digests)
        async with aclosing(two.fetch(digests)) as groups:
            await anext(groups)
        assert not [
            task for task in asyncio.all_tasks() if task.get_name().startswith("context-pack")
        ]
        assert await fetch_all(two, digests) == contents(blobs, digests)


# -- bounds


async def test_the_oldest_packs_are_deleted_beyond_the_bound(pool: Pool) -> None:
    blobs = Blobs()
    rounds = [[blobs.put(os.urandom(1 << 20)) for _ in range(3)] for _ in range(3)]
    for number, digests in enumerate(rounds):
        async with pool.node(f"node {number}", blobs) as node:
            node.added(digests)
            assert await node.wait_shared(SHARED_SECONDS)
        await pool.collect(keep_bytes=5 << 20)
    assert len(await pool.keys("packs")) == len(await pool.keys("index")) == 1
    async with pool.node("reader") as reader:
        assert await reader.find([*rounds[0], *rounds[1], *rounds[2]]) == set(rounds[2])
    async with pool.node("node 1") as stale:  # it still knows what was deleted
        await stale.find(rounds[1])
        assert await fetch_all(stale, rounds[1]) == {}


async def test_packs_that_are_read_stay_and_unused_ones_go(pool: Pool) -> None:
    blobs = Blobs()
    read, unread = blobs.make(5, 1000), blobs.make(5, 1000, seed=1)
    await share(pool, blobs, read)
    await share(pool, blobs, unread)
    async with pool.node("two", idle_seconds=8.0) as two:
        assert await two.find(read + unread) == {*read, *unread}
        deadline = time.monotonic() + 9
        while time.monotonic() < deadline:
            assert len(await fetch_all(two, read)) == 5
            await asyncio.sleep(1)
    await pool.collect(idle_seconds=8.0)
    async with pool.node("three") as three:
        assert await three.find(read + unread) == set(read)
    assert len(await pool.keys("used")) == 1


async def test_memory_stays_small_while_much_is_packed_and_fetched(pool: Pool) -> None:
    def resident_mib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

    blobs = Blobs()
    digests = [blobs.put(os.urandom(8 << 20)) for _ in range(24)]
    async with pool.node("one", blobs) as one, pool.node("two") as two:
        before = peak = resident_mib()
        one.added(digests)
        while not await one.wait_shared(0.02):
            peak = max(peak, resident_mib())
        assert await two.find(digests) == set(digests)
        async with aclosing(two.fetch(digests)) as groups:
            async for _ in groups:
                peak = max(peak, resident_mib())
    assert peak - before < 200


# -- as part of a node


@asynccontextmanager
async def no_bases(
    _address: str,
    _: ProjectStore,
    *,
    trusted: bool,
    elsewhere: object,
    judge: Judge | None,
) -> AsyncIterator[Bases]:
    del trusted, elsewhere, judge
    yield Bases({}, None)


@asynccontextmanager
async def on_machine(_: TrustDomain) -> AsyncIterator[Place]:
    yield Place("127.0.0.1:1")


@asynccontextmanager
async def projects(pool: Pool, name: str) -> AsyncIterator[ProjectPool]:
    async with AsyncExitStack() as stack:
        config = NodeConfig(gateway="127.0.0.1:1", data=pool.root / name)
        store = NodeStore(config.data / "cache", objects=pool.store())
        await stack.enter_async_context(store)
        yield await stack.enter_async_context(ProjectPool(config, store, no_bases, on_machine))


async def test_a_node_that_stops_leaves_its_context_content_to_the_others(pool: Pool) -> None:
    blobs = Blobs()
    digests = [*blobs.make(50, 2000), *blobs.make(2, 200_000, seed=1)]
    async with projects(pool, "one") as one:
        runtime = await one.runtime("web")
        await runtime.context_store.run(
            runtime.context_store.store_sync, list(blobs.content.items())
        )
        assert runtime.shared_context is not None
        runtime.shared_context.added(digests)
    async with projects(pool, "two") as two:
        shared = (await two.runtime("web")).shared_context
        assert shared is not None
        assert await fetch_all(shared, await shared.find(digests)) == contents(blobs, digests)
        other = (await two.runtime("other")).shared_context
        assert other is not None
        assert await other.find(digests) == set()


async def test_a_node_on_its_own_shares_nothing(tmp_path: Path) -> None:
    config = NodeConfig(gateway="127.0.0.1:1", data=tmp_path)
    async with (
        NodeStore(tmp_path / "cache") as store,
        ProjectPool(config, store, no_bases, on_machine) as pool,
    ):
        assert (await pool.runtime("web")).shared_context is None

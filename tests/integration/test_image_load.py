"""Images from a source into real engines: 20.10 with overlay2, 29 with containerd's store."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from asyncio import Task
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from offload_client.load.loader import load_image
from offload_client.load.progress import LoadProgress, LoadResult
from offload_client.load.source import ImageSource
from offload_core.errors import AccessDeniedError, ImageLoadError, NodeLostError
from tests.fixtures.engine import DockerEngine
from tests.fixtures.ociimages import (
    BuiltImage,
    Compression,
    LayerContent,
    MemorySource,
    busybox_layer,
    layer,
    noise_layer,
)

_MIB = 1 << 20


@pytest.fixture(scope="module")
def graphdriver() -> Iterator[DockerEngine]:
    with DockerEngine("graphdriver") as engine:
        yield engine


@pytest.fixture(scope="module")
def containerd() -> Iterator[DockerEngine]:
    with DockerEngine("containerd") as engine:
        yield engine


@pytest.fixture(scope="module")
def remote() -> Iterator[DockerEngine]:
    with DockerEngine("containerd", own_network=True) as engine:
        yield engine


@pytest.fixture(autouse=True)
def empty_engines(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test begins with an engine without images."""
    yield
    for name in {"graphdriver", "containerd", "remote"} & set(request.fixturenames):
        engine: DockerEngine = request.getfixturevalue(name)
        engine.docker("system", "prune", "--all", "--force")


def layers(
    top: str = "one", middle: int = 0, compression: Compression = "zstd"
) -> list[LayerContent]:
    return [
        busybox_layer(compression),
        noise_layer("base", 2 * _MIB, 0, compression),
        noise_layer("middle", 3 * _MIB, middle, compression),
        noise_layer("upper", _MIB // 2, 0, compression),
        layer({"top": top.encode()}, compression),
    ]


async def load(
    engine: DockerEngine,
    source: MemorySource,
    image: BuiltImage,
    tags: Sequence[str] = ("app",),
    *,
    platforms: Sequence[str] = (),
    seen: list[LoadProgress] | None = None,
) -> LoadResult:
    source.forget()
    return await load_image(
        source,
        image.digest,
        tags,
        platforms=platforms,
        environment=engine.environment,
        progress=(seen if seen is not None else []).append,
    )


def start(engine: DockerEngine, source: ImageSource, image: BuiltImage) -> Task[LoadResult]:
    """Begin to load an image as "app"."""
    return asyncio.ensure_future(
        load_image(
            source,
            image.digest,
            ["app"],
            environment=engine.environment,
            progress=lambda _: None,
        )
    )


def travelled(source: MemorySource, image: BuiltImage) -> list[int]:
    """Return the positions of the image's layers of which bytes were taken."""
    return [
        number for number, each in enumerate(image.layers) if source.taken.get(each.digest, 0) > 0
    ]


def run(engine: DockerEngine, name: str) -> str:
    """Return what the image's command prints, which is the content of /top."""
    if engine.kind == "containerd":
        # Engine 29 starts containers with a time namespace, Debian's runc 1.1 knows none.
        return read_top(engine, name)
    done = engine.docker("run", "--rm", "--network", "none", name)
    assert done.returncode == 0, f"{done.stderr.decode()}\n{engine.log_tail()}"
    return done.stdout.decode()


def read_top(engine: DockerEngine, name: str) -> str:
    """Make a container's file system and read /top and the shell out of it."""
    made = engine.docker("create", "--network", "none", name)
    assert made.returncode == 0, made.stderr.decode()
    container = made.stdout.decode().strip()
    exported = engine.docker("export", container)
    engine.docker("rm", container)
    assert exported.returncode == 0, exported.stderr.decode()
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as archive:
        assert archive.getmember("bin/busybox").size == Path("/bin/busybox").stat().st_size
        top = archive.extractfile("top")
        assert top is not None
        return top.read().decode()


def saved_files(engine: DockerEngine, name: str) -> dict[str, int]:
    """Return the files of `docker save` with their sizes."""
    done = engine.docker("save", name)
    assert done.returncode == 0, done.stderr.decode()
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return {member.name: member.size for member in archive if member.isfile()}


class TestGraphdriver:
    @pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
    async def test_first_load_brings_everything_and_the_image_runs(
        self, graphdriver: DockerEngine, compression: Compression
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers(compression=compression))
        result = await load(graphdriver, source, image, ["app:1", "localhost:5000/team/app"])
        assert result.image_id == image.config_digest
        assert (result.layers_received, result.layers_reused) == (5, 0)
        assert result.bytes_received == source.bytes_taken
        assert run(graphdriver, "app:1") == "one"
        assert graphdriver.names() >= {"app:1", "localhost:5000/team/app:latest"}

    async def test_same_image_under_another_name_takes_no_byte(
        self, graphdriver: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        await load(graphdriver, source, image)
        result = await load(graphdriver, source, image, ["other:2"])
        assert result == LoadResult(image.config_digest, 0, 0, 5)
        assert source.bytes_taken == 0
        assert run(graphdriver, "other:2") == "one"

    async def test_changed_top_layer_travels_alone(self, graphdriver: DockerEngine) -> None:
        source = MemorySource()
        await load(graphdriver, source, source.add_image(layers()))
        image = source.add_image(layers(top="two"))
        result = await load(graphdriver, source, image)
        assert travelled(source, image) == [4]
        assert (result.layers_received, result.layers_reused) == (1, 4)
        assert result.bytes_received < 4096
        assert run(graphdriver, "app") == "two"

    async def test_changed_middle_layer_brings_those_above(self, graphdriver: DockerEngine) -> None:
        source = MemorySource()
        await load(graphdriver, source, source.add_image(layers()))
        image = source.add_image(layers(middle=1))
        await load(graphdriver, source, image)
        assert travelled(source, image) == [2, 3, 4]
        assert run(graphdriver, "app") == "one"

    async def test_changed_configuration_brings_no_layer(self, graphdriver: DockerEngine) -> None:
        source = MemorySource()
        await load(graphdriver, source, source.add_image(layers()))
        image = source.add_image(layers(), environment=["COLOUR=red"])
        result = await load(graphdriver, source, image)
        assert travelled(source, image) == []
        assert result.layers_reused == 5
        assert "COLOUR=red" in graphdriver.inspect("app")["Config"]["Env"]

    async def test_layers_from_another_compression_are_reused(
        self, graphdriver: DockerEngine
    ) -> None:
        source = MemorySource()
        await load(graphdriver, source, source.add_image(layers(compression="gzip")))
        image = source.add_image(layers(top="two", compression="zstd"))
        await load(graphdriver, source, image)
        assert travelled(source, image) == [4]

    async def test_image_without_a_name_is_kept(self, graphdriver: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        result = await load(graphdriver, source, image, [])
        assert not graphdriver.inspect(result.image_id)["RepoTags"]
        assert run(graphdriver, result.image_id) == "one"

    async def test_layer_that_vanished_after_the_question_brings_everything(
        self, graphdriver: DockerEngine
    ) -> None:
        source = MemorySource()
        await load(graphdriver, source, source.add_image(layers()), ["old"])
        image = source.add_image(layers(top="two"))
        source.forget()
        pruned = PrunedMeanwhile(source, image.layers[4].digest, graphdriver, "old")
        result = await start(graphdriver, pruned, image)
        assert travelled(source, image) == [0, 1, 2, 3, 4]
        assert result.layers_received == 5
        assert run(graphdriver, "app") == "two"

    async def test_two_platforms_are_refused_before_a_byte_moves(
        self, graphdriver: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        with pytest.raises(ImageLoadError, match="holds one platform"):
            await load(graphdriver, source, image, platforms=["linux/amd64", "linux/arm64"])
        assert source.bytes_taken == 0

    async def test_damaged_layer_leaves_no_image(self, graphdriver: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        source.damage(image.layers[1].digest)
        with pytest.raises(ImageLoadError, match="damaged"):
            await load(graphdriver, source, image)
        assert not graphdriver.inspect("app")

    async def test_lost_connection_continues_where_it_ended(
        self, graphdriver: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        source.break_after[image.layers[2].digest] = (_MIB, NodeLostError("away"))
        result = await load(graphdriver, source, image)
        assert source.taken[image.layers[2].digest] == len(image.layers[2].blob)
        assert result.layers_received == 5

    async def test_cancelled_load_leaves_no_image(self, graphdriver: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        stuck = Stuck(source, image.layers[2].digest)
        task = start(graphdriver, stuck, image)
        await asyncio.wait_for(stuck.reached.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        assert not graphdriver.inspect("app")


class TestContainerd:
    @pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
    async def test_first_load_brings_everything_and_the_image_runs(
        self, containerd: DockerEngine, compression: Compression
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers(compression=compression))
        seen: list[LoadProgress] = []
        result = await load(containerd, source, image, ["app:1", "other"], seen=seen)
        assert result.image_id == image.digest
        assert (result.layers_received, result.layers_reused) == (5, 0)
        assert travelled(source, image) == [0, 1, 2, 3, 4]
        assert run(containerd, "app:1") == "one"
        assert {name for name in containerd.names() if "127.0.0.1" in name} == set()
        assert seen[0].phase == "checking"
        assert seen[-1].phase == "done"
        assert seen[-1].bytes_received == result.bytes_received == source.bytes_taken

    async def test_same_image_under_another_name_takes_nothing_at_all(
        self, containerd: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        await load(containerd, source, image)
        result = await load(containerd, source, image, ["other:2"])
        assert result == LoadResult(image.digest, 0, 0, 5)
        assert source.bytes_taken == source.manifests_taken.total() == 0
        assert run(containerd, "other:2") == "one"

    async def test_changed_top_layer_travels_alone(self, containerd: DockerEngine) -> None:
        source = MemorySource()
        await load(containerd, source, source.add_image(layers()))
        image = source.add_image(layers(top="two"))
        result = await load(containerd, source, image)
        assert travelled(source, image) == [4]
        assert (result.layers_received, result.layers_reused) == (1, 4)
        assert run(containerd, "app") == "two"

    async def test_changed_middle_layer_travels_alone_and_save_is_complete(
        self, containerd: DockerEngine
    ) -> None:
        source = MemorySource()
        await load(containerd, source, source.add_image(layers()))
        image = source.add_image(layers(middle=1))
        await load(containerd, source, image)
        assert travelled(source, image) == [2]
        assert run(containerd, "app") == "one"
        sizes = saved_files(containerd, "app").values()
        assert {len(each.blob) for each in image.layers} <= set(sizes)

    async def test_image_without_a_name_is_kept_and_brings_only_new_layers(
        self, containerd: DockerEngine
    ) -> None:
        source = MemorySource()
        await load(containerd, source, source.add_image(layers()))
        image = source.add_image(layers(top="two"))
        result = await load(containerd, source, image, [])
        assert travelled(source, image) == [4]
        assert not containerd.inspect(result.image_id).get("RepoTags")
        assert run(containerd, result.image_id) == "two"
        again = source.add_image(layers(top="three"))
        await load(containerd, source, again, [])
        assert travelled(source, again) == [4]

    async def test_manifest_without_an_index_is_loaded(self, containerd: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image(layers(), attested=False)
        await load(containerd, source, image)
        assert run(containerd, "app") == "one"

    async def test_foreign_platform_of_a_single_image_is_loaded(
        self, containerd: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image([layer({"top": b"s390x"})], architecture="s390x")
        result = await load(containerd, source, image)
        assert result.layers_received == 1
        plain = source.add_image([layer({"top": b"x"})], architecture="s390x", attested=False)
        assert (await load(containerd, source, plain, ["plain"])).layers_received == 1

    async def test_two_platforms_of_one_index_are_loaded(self, containerd: DockerEngine) -> None:
        source = MemorySource()
        image = two_platforms(source)
        result = await load(containerd, source, image, platforms=["linux/amd64", "linux/s390x"])
        assert result.layers_received == 3
        shown = containerd.docker("image", "inspect", "--platform", "linux/s390x", "app")
        assert json.loads(shown.stdout)[0]["Architecture"] == "s390x"
        assert run(containerd, "app") == "two platforms"
        again = await load(
            containerd, source, image, ["again"], platforms=["linux/amd64", "linux/s390x"]
        )
        assert (again.bytes_received, source.manifests_taken.total()) == (0, 0)

    async def test_platform_that_was_not_built_is_named(self, containerd: DockerEngine) -> None:
        source = MemorySource()
        with pytest.raises(ImageLoadError, match="not built for linux/ppc64le, only for linux/"):
            await load(containerd, source, two_platforms(source), platforms=["linux/ppc64le"])

    async def test_cancelled_load_leaves_neither_image_nor_name(
        self, containerd: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        stuck = Stuck(source, image.layers[2].digest)
        task = start(containerd, stuck, image)
        await asyncio.wait_for(stuck.reached.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)
        await asyncio.sleep(1)
        assert containerd.names() == set()

    async def test_engine_asks_for_the_rest_after_a_broken_transfer(
        self, containerd: DockerEngine
    ) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        digest = image.layers[2].digest
        source.break_after[digest] = (_MIB, AccessDeniedError("not retried by the client"))
        result = await load(containerd, source, image)
        assert result.layers_received == 5
        assert source.taken[digest] < len(image.layers[2].blob) + _MIB
        assert run(containerd, "app") == "one"

    async def test_source_error_is_the_users_error(self, containerd: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        source.broken[image.layers[2].digest] = AccessDeniedError("ticket expired")
        with pytest.raises(AccessDeniedError, match="ticket expired"):
            await load(containerd, source, image)
        assert not containerd.inspect("app")

    async def test_damaged_layer_leaves_no_image(self, containerd: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image([busybox_layer(), noise_layer("hurt", _MIB)])
        source.damage(image.layers[1].digest)
        with pytest.raises(ImageLoadError, match="damaged"):
            await load(containerd, source, image)
        assert not containerd.inspect("app")


class TestEngineOutOfReach:
    async def test_whole_image_comes_as_a_layout_and_runs(self, remote: DockerEngine) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        result = await load(remote, source, image, ["app:1", "other"])
        assert result.image_id == image.digest
        assert result.layers_received == 5
        assert run(remote, "app:1") == run(remote, "other") == "one"

    async def test_next_image_leaves_out_what_the_last_brought(self, remote: DockerEngine) -> None:
        source = MemorySource()
        await load(remote, source, source.add_image(layers()))
        image = source.add_image(layers(middle=1))
        await load(remote, source, image)
        assert travelled(source, image) == [2]
        assert run(remote, "app") == "one"
        sizes = saved_files(remote, "app").values()
        assert {len(each.blob) for each in image.layers} <= set(sizes)

    async def test_removed_image_is_no_longer_counted_on(self, remote: DockerEngine) -> None:
        source = MemorySource()
        await load(remote, source, source.add_image(layers()))
        assert remote.docker("rmi", "app").returncode == 0
        image = source.add_image(layers(top="two"))
        await load(remote, source, image)
        assert travelled(source, image) == [0, 1, 2, 3, 4]
        assert run(remote, "app") == "two"

    async def test_one_platform_of_an_index_is_loaded(self, remote: DockerEngine) -> None:
        source = MemorySource()
        image = two_platforms(source)
        result = await load(remote, source, image)
        assert result.layers_received == 2
        assert run(remote, "app") == "two platforms"

    async def test_image_without_a_name_is_kept(self, remote: DockerEngine) -> None:
        source = MemorySource()
        result = await load(remote, source, source.add_image(layers()), [])
        assert run(remote, result.image_id) == "one"


class TestNoEngine:
    async def test_missing_engine_is_a_clear_error(self, tmp_path: Any) -> None:
        source = MemorySource()
        image = source.add_image([layer({"top": b"x"})])
        with pytest.raises(
            ImageLoadError, match=r"no container engine answers at unix:///.*s"
        ) as e:
            await load_image(
                source,
                image.digest,
                ["app"],
                environment={"DOCKER_HOST": f"unix://{tmp_path}/s", "HOME": str(tmp_path)},
                progress=lambda _: None,
            )
        assert "No such file or directory" in e.value.message
        assert "-o type=docker,dest=FILE" in e.value.hint

    @pytest.mark.parametrize("kind", ["graphdriver", "containerd"])
    async def test_engine_that_dies_during_the_load_is_named(self, kind: Any) -> None:
        source = MemorySource()
        image = source.add_image(layers())
        with DockerEngine(kind) as engine:
            stuck = Stuck(source, image.layers[2].digest)
            task = start(engine, stuck, image)
            await asyncio.wait_for(stuck.reached.wait(), 20)
            engine.kill()
            stuck.free.set()
            with pytest.raises(ImageLoadError, match="stopped answering") as e:
                await asyncio.wait_for(task, 30)
            assert "is docker still running" in e.value.hint


def two_platforms(source: MemorySource) -> BuiltImage:
    here = [busybox_layer(), layer({"top": b"two platforms"})]
    there = [layer({"top": b"elsewhere"})]
    first, config = source.add_platform(here, architecture="amd64")
    second, _ = source.add_platform(there, architecture="s390x")
    return BuiltImage(
        source.add_index([(first, "amd64"), (second, "s390x")]), config, (*here, *there)
    )


class PrunedMeanwhile:
    """A source during whose transfer someone removes an image from the engine."""

    def __init__(self, source: MemorySource, digest: str, engine: DockerEngine, image: str) -> None:
        self._source = source
        self._digest = digest
        self._engine = engine
        self._image = image

    async def manifest(self, digest: str) -> tuple[str, bytes]:
        return await self._source.manifest(digest)

    async def blob(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        if digest == self._digest:
            await asyncio.to_thread(self._engine.docker, "rmi", self._image)
        async for piece in self._source.blob(digest, offset):
            yield piece


class Stuck:
    """A source that stops in the middle of a blob."""

    def __init__(self, source: MemorySource, digest: str) -> None:
        self._source = source
        self._digest = digest
        self.reached = asyncio.Event()
        self.free = asyncio.Event()

    async def manifest(self, digest: str) -> tuple[str, bytes]:
        return await self._source.manifest(digest)

    async def blob(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        async for piece in self._source.blob(digest, offset):
            yield piece
            if digest == self._digest:
                self.reached.set()
                await self.free.wait()

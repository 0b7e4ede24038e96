"""Model files of a project travel between sessions through the shared store."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload_builder.node.sessions.contract import MODELS_VOLUME
from offload_builder.node.sessions.models import SessionModels
from offload_cache.nodestore import NodeStore
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.engine import DockerEngine
from tests.fixtures.guardedengine import PLACE, PlainEngine

BASES = (0, 300_000)


@pytest.fixture(scope="module")
def engine():
    with DockerEngine("containerd") as running:
        yield running


@dataclass
class Node:
    store: NodeStore
    models: SessionModels
    engine: PlainEngine
    docker: DockerEngine
    shared: Path

    @property
    def volume(self) -> Path:
        return self.docker.root / "d" / "volumes" / MODELS_VOLUME / "_data"

    async def settled(self) -> None:
        async with asyncio.timeout(30):
            # It comes after everything that it names.
            while not list(self.shared.glob("objects/projects/default/mounts/*/*")):
                await asyncio.sleep(0.02)


@pytest.fixture
async def node(engine, tmp_path):
    """Make nodes of one pool with an engine; each begins without a volume."""
    stores = []

    async def make(name: str, id_base: int = 0, max_bytes: int = 1 << 30) -> Node:
        engine.docker("volume", "rm", MODELS_VOLUME)
        objects = DirectoryObjectStore(tmp_path / "shared")
        store = NodeStore(tmp_path / name, objects=objects)
        await store.__aenter__()
        stores.append(store)
        models = SessionModels(store, tmp_path / f"{name}-i", node=name, max_bytes=max_bytes)
        return Node(
            store,
            models,
            PlainEngine(engine, engine_id=name, id_base=id_base),
            engine,
            tmp_path / "shared",
        )

    yield make
    for store in stores:
        await store.__aexit__(None, None, None)


async def test_a_second_session_at_another_node_starts_with_the_files(node):
    weights = os.urandom(3_000_000)
    first = await node("one", id_base=BASES[1])
    await first.models.prepare(first.engine, PLACE)
    assert first.volume.is_dir()
    (first.volume / "hub").mkdir()
    path = first.volume / "hub" / "model.bin"
    path.write_bytes(weights)
    (first.volume / "hub" / "latest").symlink_to("model.bin")
    os.chown(path, BASES[1] + 1000, BASES[1] + 1000)
    path.chmod(0o640)
    await first.models.keep(first.engine, PLACE)
    await first.settled()

    second = await node("two", id_base=BASES[1] + 65536)
    await second.models.prepare(second.engine, PLACE)
    path = second.volume / "hub" / "model.bin"
    assert path.read_bytes() == weights
    assert (second.volume / "hub" / "latest").readlink() == Path("model.bin")
    found = path.stat()
    base = BASES[1] + 65536
    assert (found.st_uid - base, found.st_gid - base, found.st_mode & 0o777) == (1000, 1000, 0o640)
    # What is in a session is not replaced by what is stored.
    path.write_bytes(b"changed")
    await second.models.prepare(second.engine, PLACE)
    assert path.read_bytes() == b"changed"


async def test_links_out_of_the_volume_reach_nothing_of_the_node(node, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the node's")
    one = await node("one")
    await one.models.prepare(one.engine, PLACE)
    one.volume.rmdir()
    one.volume.symlink_to(outside)
    await one.models.keep(one.engine, PLACE)
    one.volume.unlink()
    one.volume.mkdir()
    two = await node("two")
    await two.models.prepare(two.engine, PLACE)
    assert not list(two.volume.iterdir())


async def test_files_beyond_the_bound_are_not_stored(node):
    one = await node("one", max_bytes=1000)
    await one.models.prepare(one.engine, PLACE)
    (one.volume / "large").write_bytes(os.urandom(2000))
    await one.models.keep(one.engine, PLACE)
    two = await node("two")
    await two.models.prepare(two.engine, PLACE)
    assert not list(two.volume.iterdir())

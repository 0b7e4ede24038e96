from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_cache.health import StoreHealth
from offload_cache.nodestore import NodeStore
from offload_cache.registry import Registry, RegistryServer, UploadLimits
from tests.fixtures.directorystore import DirectoryObjectStore
from tests.fixtures.registryclient import MAX_BLOB, RegistryBench, RegistryClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest.fixture
def make_node(tmp_path: Path) -> Callable[..., NodeStore]:
    """Return a maker of nodes by name, which share one directory store unless told otherwise."""

    def make(name: str = "one", *, shared: bool = True, **options: object) -> NodeStore:
        objects = None
        if shared:
            health = StoreHealth("the shared directory", pause_seconds=0.2)
            objects = DirectoryObjectStore(tmp_path / "shared", health=health)
        return NodeStore(tmp_path / name, objects=objects, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
async def node(make_node: Callable[..., NodeStore]) -> AsyncIterator[NodeStore]:
    async with make_node() as opened:
        yield opened


@pytest.fixture
async def bench(node: NodeStore) -> AsyncIterator[RegistryBench]:
    registry = Registry()
    async with RegistryServer(
        registry, node.statistics, limits=UploadLimits(blob_bytes=MAX_BLOB)
    ) as server:
        bench = RegistryBench(node, registry, server)
        async with bench.http:
            yield bench


@pytest.fixture
async def client(bench: RegistryBench) -> RegistryClient:
    return await bench.client()

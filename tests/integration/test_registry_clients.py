"""The clients that people use, against a node's registry: they push, pull, list and delete."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload_cache.contributions import Writer
from offload_cache.nodestore import NodeStore
from offload_cache.registry import Grant, Registry, RegistryServer
from tests.fixtures.containerd import Containerd
from tests.fixtures.engine import DockerEngine, StoreKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CRANE = Path(__file__).resolve().parents[2] / ".tools" / "bin" / "crane"
LAYER_BYTES = 3 << 20


class Node:
    """A node's registry with a build's repository in it."""

    def __init__(self, store: NodeStore, registry: Registry, server: RegistryServer) -> None:
        self.store = store
        self.registry = registry
        self.server = server

    async def repository(self, project: str = "shop") -> str:
        """Return a new build's image repository as clients name it."""
        grant = Grant(await self.store.project(project), (), None, "k", Writer("b", "m", "member"))
        return f"{self.server.address}/{self.registry.grant(grant)}/image"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    registry = Registry()
    async with (
        NodeStore(tmp_path / "node") as store,
        RegistryServer(registry, store.statistics) as server,
    ):
        yield Node(store, registry, server)


@pytest.fixture
def files() -> bytes:
    """A root file system as a tar, different each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("data")
        member.size = LAYER_BYTES
        archive.addfile(member, io.BytesIO(os.urandom(LAYER_BYTES)))
    return buffer.getvalue()


async def docker(
    engine: DockerEngine, *arguments: str, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    done = await asyncio.to_thread(engine.docker, *arguments, stdin=stdin)
    assert done.returncode == 0, f"{done.stderr.decode()}\n{engine.log_tail()}"
    return done


async def crane(*arguments: str) -> str:
    done = await asyncio.to_thread(
        subprocess.run, [CRANE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


async def append(files: bytes, folder: Path, name: str) -> None:
    """Push an image with one layer."""
    layer = folder / "layer.tar"
    layer.write_bytes(files)
    await crane("append", "--oci-empty-base", "-f", str(layer), "-t", name)


@pytest.mark.parametrize("kind", ["graphdriver", "containerd"])
async def test_a_docker_engine_pushes_and_pulls(node: Node, kind: StoreKind, files: bytes) -> None:
    repository = await node.repository()
    with DockerEngine(kind) as engine:
        await docker(engine, "import", "-c", 'CMD ["/x"]', "-", f"{repository}:v1", stdin=files)
        await docker(engine, "push", f"{repository}:v1")
        # Once more, and under another name: nothing is sent.
        received = node.store.statistics.bytes_received
        await docker(engine, "tag", f"{repository}:v1", f"{repository}:v2")
        await docker(engine, "push", f"{repository}:v2")
        assert node.store.statistics.bytes_received - received < 10_000
        # Into the repository of another build of the project: mounted, or found there.
        other = await node.repository()
        await docker(engine, "tag", f"{repository}:v1", f"{other}:v1")
        await docker(engine, "push", f"{other}:v1")
        assert node.store.statistics.bytes_received - received < 20_000
        digest = await crane("digest", f"{repository}:v1")
        names = [f"{repository}:v1", f"{repository}:v2", f"{other}:v1"]
        await docker(engine, "image", "rm", *names)
        for reference in (f"{other}:v1", f"{repository}@{digest}"):
            await docker(engine, "pull", reference)
            assert engine.inspect(reference)["Config"]["Cmd"] == ["/x"]
    assert node.store.statistics.blob_hits >= 2


async def test_containerd_pulls_and_pushes(node: Node, files: bytes, tmp_path: Path) -> None:
    repository = await node.repository()
    (tmp_path / "layer.tar").write_bytes(files)
    await crane(
        "append", "--oci-empty-base", "-f", str(tmp_path / "layer.tar"), "-t", f"{repository}:v1"
    )
    digest = await crane("digest", f"{repository}:v1")

    def run() -> None:
        with Containerd() as containerd:
            for reference in (f"{repository}:v1", f"{repository}@{digest}"):
                done = containerd.ctr(
                    "images", "pull", "--plain-http", "--snapshotter", "native", reference
                )
                assert done.returncode == 0, done.stderr
            done = containerd.ctr("images", "tag", f"{repository}:v1", f"{repository}:v2")
            assert done.returncode == 0, done.stderr
            done = containerd.ctr("images", "push", "--plain-http", f"{repository}:v2")
            assert done.returncode == 0, done.stderr
            content = containerd.ctr("content", "ls").stdout
            assert digest in content

    await asyncio.to_thread(run)
    assert await crane("digest", f"{repository}:v2") == digest


async def test_crane_copies_lists_and_deletes(node: Node, files: bytes, tmp_path: Path) -> None:
    repository, other = await node.repository(), await node.repository()
    foreign = await node.repository("other-project")
    (tmp_path / "layer.tar").write_bytes(files)
    await crane(
        "append", "--oci-empty-base", "-f", str(tmp_path / "layer.tar"), "-t", f"{repository}:v1"
    )
    assert await crane("ls", repository) == "v1"
    digest = await crane("digest", f"{repository}:v1")
    assert len(json.loads(await crane("manifest", f"{repository}:v1"))["layers"]) == 1
    assert await crane("validate", "--remote", f"{repository}:v1") == f"PASS: {repository}:v1"

    received = node.store.statistics.bytes_received
    await crane("copy", f"{repository}:v1", f"{other}:v1")
    assert node.store.statistics.bytes_received - received < 10_000
    await crane("copy", f"{repository}:v1", f"{foreign}:v1")  # another project shares nothing
    assert node.store.statistics.bytes_received - received > LAYER_BYTES // 2

    for number in range(5):
        await crane("tag", f"{repository}:v1", f"t{number}")
    assert (await crane("ls", repository)).split() == ["t0", "t1", "t2", "t3", "t4", "v1"]
    await crane("pull", "--format", "oci", f"{foreign}:v1", str(tmp_path / "layout"))
    await crane("push", str(tmp_path / "layout"), f"{repository}:again")
    assert await crane("digest", f"{repository}:again") == digest

    await crane("delete", f"{repository}:t0")
    assert "t0" not in (await crane("ls", repository)).split()
    await crane("delete", f"{repository}@{digest}")
    assert await crane("ls", repository) == ""
    assert await crane("digest", f"{other}:v1") == digest


async def test_an_image_goes_round_all_clients(node: Node, files: bytes, tmp_path: Path) -> None:
    first, second = await node.repository(), await node.repository()
    with DockerEngine("graphdriver") as old, DockerEngine("containerd") as new:
        await docker(old, "import", "-", f"{first}:v1", stdin=files)
        await docker(old, "push", f"{first}:v1")
        await docker(new, "pull", f"{first}:v1")
        await docker(new, "tag", f"{first}:v1", f"{second}:v1")
        await docker(new, "push", f"{second}:v1")
        await docker(old, "pull", f"{second}:v1")
        layers = [old.inspect(f"{second}:v1")["RootFS"], new.inspect(f"{first}:v1")["RootFS"]]
    assert layers[0]["Layers"] == layers[1]["Layers"]
    assert await crane("validate", "--remote", f"{second}:v1") == f"PASS: {second}:v1"

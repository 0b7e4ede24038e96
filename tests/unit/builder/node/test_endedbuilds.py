"""Builds that have ended are kept for their time, over a restart, and go in their order."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from offload_builder.node.endedbuilds import EndedBuilds
from offload_builder.node.imagefiles import ImageFiles
from offload_cache.nodestore import NodeStore
from offload_core.digest import sha256_digest
from offload_core.errors import NotFoundError
from offload_proto.v1.builds_service_pb2 import BuildState, BuildStats
from offload_proto.v1.events_pb2 import ProgressBatch
from offload_proto.v1.node_service_pb2 import Failure, Result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DONE = BuildState.BUILD_STATE_SUCCEEDED


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[NodeStore]:
    async with NodeStore(tmp_path / "cache") as found:
        yield found


def kept(folder: Path, store: NodeStore, **options: Any) -> EndedBuilds:
    settings = {"keep_seconds": 60.0, "keep_builds": 10, "keep_bytes": 1 << 30, **options}
    return EndedBuilds(folder / "ended", store, **settings)


async def end(ended: EndedBuilds, store: NodeStore, build_id: str, *, saved: bool = False) -> str:
    """End a build that has made an image with one layer; return the layer's digest."""
    cache = await store.project("web")
    layer = build_id.encode() * 1000
    digest = sha256_digest(layer)
    await cache.store.put_blob(layer, digest)
    body = orjson.dumps({"layers": [{"digest": digest, "size": len(layer)}]})
    manifest = sha256_digest(body)
    await cache.store.put_blob(body, manifest)
    journal = ended.journal(build_id, "web", "ann")
    assert journal.append(ProgressBatch())
    result = Result()
    result.success.image.digest = manifest
    image = ImageFiles(cache.store)
    await image.admit(manifest)
    job: Any = SimpleNamespace(
        build_id=build_id, project_id="web", member="ann", image_saved=saved, image_names=[],
        journal=journal, image=image, stats=BuildStats(), network_policy=b"",
    )  # fmt: skip
    journal.finish()
    ended.keep(job, result, DONE, "")
    return digest


def nobody(_: str) -> bool:
    return False


async def test_builds_beyond_the_number_go_oldest_first_unless_they_are_in_use(tmp_path, store):
    ended = kept(tmp_path, store, keep_builds=2)
    for name in ("a", "b", "c", "d"):
        await end(ended, store, name)
    ended.sweep(lambda build_id: build_id == "a")
    assert [bool(ended.find(name)) for name in "abcd"] == [True, False, True, True]
    ended.sweep(nobody)
    assert [bool(ended.find(name)) for name in "abcd"] == [False, False, True, True]
    assert sorted(path.name for path in (tmp_path / "ended").iterdir()) == [
        "c.json", "c.log", "d.json", "d.log",
    ]  # fmt: skip
    ended.close()


async def test_images_that_are_too_large_together_are_held_no_more(tmp_path, store):
    ended = kept(tmp_path, store, keep_bytes=2500)
    leases = (await store.project("web")).store.disk._leases
    first, second, third = [await end(ended, store, name) for name in ("a", "b", "c")]
    assert first not in leases
    assert leases[second] == leases[third] == 1
    ended.close()
    assert not leases


async def test_logs_that_are_too_large_together_go_oldest_first(tmp_path, store):
    ended = kept(tmp_path, store, keep_bytes=9)
    for name in ("a", "b", "c"):
        await end(ended, store, name)
    found = ended.find("a")
    assert found is not None
    assert found.journal.size_bytes == 6
    found.visits = 1
    ended.sweep(nobody)
    assert [bool(ended.find(name)) for name in "abc"] == [True, False, False]
    found.visits = 0
    ended.sweep(nobody)
    assert ended.find("a") is not None
    ended.close()


async def test_saved_image_is_known_when_its_log_is_gone(tmp_path, store):
    ended = kept(tmp_path, store, keep_seconds=0.0)
    await end(ended, store, "a", saved=True)
    await end(ended, store, "b")
    ended.sweep(nobody)
    assert ended.find("b") is None
    found = ended.find("a")
    assert found is not None
    assert found.image_digest
    assert not (tmp_path / "ended" / "a.log").exists()
    ended.close()
    again = kept(tmp_path, store, keep_seconds=0.0)
    await again.restore()
    assert again.find("a") is not None
    again.close()


async def test_restart_finds_what_was_kept_and_what_was_interrupted(tmp_path, store):
    ended = kept(tmp_path, store)
    digest = await end(ended, store, "a")
    await end(ended, store, "told")
    ended.told("told")
    ended.journal("running", "web", "ann").append(ProgressBatch())
    ended.close()
    folder = tmp_path / "ended"
    (folder / "junk").write_bytes(b"?")
    (folder / "x.json").write_bytes(b"{")
    (folder / "y.log").write_bytes(b"no document")
    document = orjson.loads((folder / "a.json").read_bytes())
    broken = {**document, "build_id": "z", "result": base64.b64encode(b"\xff\xff").decode()}
    (folder / "z.json").write_bytes(orjson.dumps(broken))

    again = kept(tmp_path, store)
    untold = await again.restore()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {item.build_id for item in untold} == {"a", "running"}
    found = again.find("a")
    assert found is not None
    assert found.member == "ann"
    assert found.image.size(digest) == 1000
    assert found.journal.sequence == 1
    lost = again.find("running")
    assert lost is not None
    assert lost.result is not None
    assert lost.result.failure.kind == Failure.KIND_NODE
    assert lost.record.state == BuildState.BUILD_STATE_LOST
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"{name}.{kind}" for name in ("a", "told", "running") for kind in ("json", "log")
    }
    again.close()


async def test_saved_images_take_no_room_from_other_builds(tmp_path, store):
    ended = kept(tmp_path, store, keep_builds=2)
    for name in ("s1", "s2", "s3", "a", "b"):
        await end(ended, store, name, saved=name.startswith("s"))
    ended.sweep(nobody)
    ended.sweep(nobody)
    assert all(ended.find(name) for name in ("s1", "s2", "s3", "a", "b"))
    logs = sorted(path.stem for path in (tmp_path / "ended").glob("*.log"))
    assert logs == ["a", "b"]
    ended.close()


async def test_saved_images_of_a_former_process_hold_no_file_open(tmp_path, store):
    ended = kept(tmp_path, store, keep_seconds=0.0)
    for number in range(20):
        await end(ended, store, f"s{number}", saved=True)
        ended.told(f"s{number}")
    ended.sweep(nobody)
    ended.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    again = kept(tmp_path, store)
    assert await again.restore() == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not list((tmp_path / "ended").glob("*.log"))
    again.close()


async def test_image_that_was_out_of_reach_at_the_start_is_found_later(tmp_path, store):
    ended = kept(tmp_path, store)
    layer = await end(ended, store, "a", saved=True)
    ended.told("a")
    found = ended.find("a")
    assert found is not None
    manifest = found.image_digest
    ended.close()
    disk = (await store.project("web")).store.disk
    path = disk.find(manifest)
    assert path is not None
    body = path.read_bytes()
    disk.delete(manifest)
    again = kept(tmp_path, store)
    await again.restore()
    found = again.find("a")
    assert found is not None
    with pytest.raises(NotFoundError):
        await found.know_image()
    await (await store.project("web")).store.put_blob(body)
    await found.know_image()
    assert found.image.size(layer) == 1000
    again.close()

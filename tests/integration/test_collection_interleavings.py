"""Collections beside publications and imports, in random order, over a real MinIO."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import pytest
import structlog

from offload_cache.collection import publishing, roots
from offload_cache.collection.listing import list_all
from offload_cache.collection.snapshot import ProjectSnapshot
from offload_cache.s3store import S3Config, S3Store
from tests.fixtures.collectionactors import CONTENTS, Meeting, Tally
from tests.fixtures.minio import MinioServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from offload_cache.objectstore import ObjectInfo, ObjectStore

pytestmark = pytest.mark.usefixtures("quiet")

INTERLEAVINGS = 10_000
ROUNDS = 50
PARALLEL = 8


@pytest.fixture
def quiet() -> Iterator[None]:
    """Some 50,000 lines of log say nothing here and take their time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


@pytest.fixture
def minio(tmp_path: Path) -> Iterator[MinioServer]:
    with MinioServer(tmp_path / "minio") as server:
        yield server


async def play(
    minio: MinioServer, folder: Path, rounds: int, *, first_seed: int = 0, enough: int = 10**9
) -> Tally:
    """Play rounds in several universes at a time, until `enough` imports have failed."""
    for content in CONTENTS:
        (folder / str(content[0])).write_bytes(content)
    tally = Tally()
    seeds = iter(range(first_seed, first_seed + rounds // ROUNDS))
    objects = S3Store(
        S3Config(minio.endpoint_url, "builds", minio.access_key, minio.secret_key), writers=8
    )

    async def work() -> None:
        for seed in seeds:
            if len(tally.failed) >= enough:
                return
            await Meeting(objects, seed, folder, tally).play(ROUNDS)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(PARALLEL):
                group.create_task(work())
    finally:
        await objects.close()
    return tally


@pytest.mark.timeout(1800)
async def test_no_import_fails_beside_collections(minio: MinioServer, tmp_path: Path) -> None:
    started = time.monotonic()
    tally = await play(minio, tmp_path, INTERLEAVINGS)
    print(f"{tally.rounds} interleavings, {tally.requests} requests, "
          f"{tally.published} published, {tally.imported} imported, {tally.deleted_blobs} blobs "
          f"deleted, {tally.crashes} crashes, {time.monotonic() - started:.0f} s")  # fmt: skip
    assert tally.failed == []
    assert tally.rounds == INTERLEAVINGS
    # The test is worth nothing where nothing was at stake.
    assert tally.deleted_blobs > INTERLEAVINGS / 20
    assert tally.imported > INTERLEAVINGS / 2
    assert tally.crashes > INTERLEAVINGS / 50


async def never(*_: object) -> bool:
    return False


async def documents_first(
    objects: ObjectStore,
    project_id: str,
    read_leases: Callable[[Sequence[ObjectInfo]], Awaitable[None]],
) -> ProjectSnapshot:
    snapshot = ProjectSnapshot(project_id)
    for kind in ("contributions", "images", "removed", "leases"):
        snapshot.add(await list_all(objects, f"projects/{project_id}/{kind}/"))
    await read_leases(snapshot.leases)
    return snapshot


BROKEN = {
    "publications do not look at the lists": (publishing, "is_condemned", never),
    "documents are listed before leases": (roots, "read_roots_snapshot", documents_first),
    "what was ever seen is trusted": (
        publishing.Sightings,
        "vouch",
        lambda self, *name: name[:2] in self._seen or name[:2] in self._written,
    ),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("broken", BROKEN)
async def test_imports_fail_where_a_rule_is_broken(
    minio: MinioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(*BROKEN[broken])
    tally = await play(minio, tmp_path, 3_000, enough=1)
    assert tally.failed

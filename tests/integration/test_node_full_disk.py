"""A disk of the node that is really full: a small tmpfs. Needs root."""

from __future__ import annotations

import hashlib
import os
import subprocess
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import pytest

from offload_builder.node.contextstore import ContextStore
from offload_builder.node.journal import Journal
from offload_builder.node.stickytimes import StickyTimes
from offload_builder.node.telling import NewPage, Telling, told_entries
from offload_builder.node.toldtables import ListingKey
from offload_core.errors import QuotaExceededError
from offload_proto.v1.events_pb2 import ProgressBatch, VertexLog
from tests.fixtures.contentclients import Project
from tests.fixtures.listings import Tree, encoded, file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def small_disk(tmp_path: Path, options: str) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def batch(data: bytes) -> ProgressBatch:
    return ProgressBatch(logs=[VertexLog(vertex="v", data=data)])


async def test_journal_on_a_full_disk_has_a_gap_and_no_damage(tmp_path):
    with small_disk(tmp_path, "size=256k") as disk, Journal(disk / "log") as journal:
        assert journal.append(batch(b"first" * 10))
        (disk / "filler").write_bytes(bytes(200 << 10))
        assert not journal.append(batch(os.urandom(100 << 10)))
        assert not journal.append(batch(os.urandom(100 << 10)))
        assert journal.lost_batches == 2
        (disk / "filler").unlink()
        assert journal.append(batch(b"second"))
        journal.finish()
        async with aclosing(journal.read()) as runs:
            found = [(item.sequence, item.logs[0].data) async for run in runs for item in run]
        assert found == [(1, b"first" * 10), (2, b"second")]


def test_journal_that_cannot_be_made_is_a_sentence(tmp_path):
    with small_disk(tmp_path, "nr_inodes=2") as disk:
        (disk / "last").touch()
        with pytest.raises(QuotaExceededError, match="disk of the node is full"):
            Journal(disk / "log")


def tell(times: StickyTimes, key: ListingKey, tree: Tree) -> dict[str, int]:
    """List a tree to its end; the times that BuildKit is told."""
    telling = Telling(times, key)
    telling.open()
    told = telling.take(
        [
            NewPage(page.digest, page.data, page.times)
            if telling.needs_data(page.digest)
            else page.digest
            for page in encoded(tree)
        ]
    )
    telling.finish()
    return {entry.path: entry.modified_at_ns for page in told for entry in told_entries(page)}


def test_times_that_could_not_be_kept_are_not_remembered(tmp_path):
    with small_disk(tmp_path, "size=512k") as disk:
        times = StickyTimes(disk / "times.db")
        key = ListingKey(f"k-{times.generation('k')}", "context")
        assert tell(times, key, {"kept": file(b"1", modified_at_ns=5)}) == {"kept": 5}
        times.settle(key)
        (disk / "filler").write_bytes(bytes(300 << 10))
        many = {f"{number:05}" * 40: file(b"2") for number in range(5000)}
        with pytest.raises(QuotaExceededError, match="disk of the node is full"):
            tell(times, key, many)
        (disk / "filler").unlink()
        # The generation has ended: BuildKit may have been told of what was not kept.
        renewed = ListingKey(f"k-{times.generation('k')}", "context")
        assert tell(times, renewed, {"0" * 200: file(b"2", modified_at_ns=77)}) == {"0" * 200: 77}
        times.close()


async def test_context_store_on_a_full_disk_says_so_and_keeps_nothing_half(tmp_path):
    with small_disk(tmp_path, "size=400k") as disk:
        async with ContextStore(disk / "context", keep_bytes=1 << 20) as store:
            one, many = os.urandom(600 << 10), [os.urandom(50_000) for _ in range(12)]
            for contents in ([one], many):
                blobs = [(hashlib.sha256(data).digest(), data) for data in contents]
                with pytest.raises(QuotaExceededError, match="cannot store the build context"):
                    await store.run(store.store_sync, blobs)
                digests = [digest for digest, _ in blobs]
                assert await store.run(store.missing_sync, digests) == digests
            assert not list(disk.glob("context/*/*.seg"))
            assert sum(path.stat().st_size for path in disk.glob("context/??/*")) == 0


async def test_upload_to_a_full_disk_ends_the_build_with_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr("offload_builder.node.uploads.DISCARD_SECONDS", 0.1)
    with small_disk(tmp_path, "size=512k") as disk:
        async with Project(disk / "context") as project:
            small, big = os.urandom(1000), os.urandom(600 << 10)
            client = project.client(small, big, answers=True)
            files = client.wanted()
            await client.content.request(files)
            with pytest.raises(QuotaExceededError, match="disk of the node is full"):
                await client.read(files[1])
            await client.leave()
            # What had room is kept for the retry.
            again = project.client(small)
            assert await project.missing(small) in ([], [again.wanted()[0].sha256])

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
from offload_core.errors import QuotaExceededError
from offload_proto.v1.events_pb2 import ProgressBatch, VertexLog
from tests.fixtures.contentclients import Project
from offload_proto.v1.node_service_pb2 import ContextEntry

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
        assert not journal.append(batch(bytes(100 << 10)))
        assert not journal.append(batch(bytes(100 << 10)))
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


def test_times_that_could_not_be_kept_are_not_remembered(tmp_path):
    with small_disk(tmp_path, "size=512k") as disk:
        times = StickyTimes(disk / "times.db")
        generation = times.generation("k")
        times.apply("k", [ContextEntry(path="kept", sha256=b"1", modified_at_unix_ns=5)])
        (disk / "filler").write_bytes(bytes(300 << 10))
        entries = [ContextEntry(path=f"{n}" * 50, sha256=bytes(32)) for n in range(5000)]
        with pytest.raises(QuotaExceededError, match="disk of the node is full"):
            times.apply("k", entries)
        (disk / "filler").unlink()
        again = [
            ContextEntry(path="kept", sha256=b"1", modified_at_unix_ns=9),
            ContextEntry(path="0" * 50, sha256=bytes(32), modified_at_unix_ns=77),
        ]
        times.apply("k", again)
        assert [entry.modified_at_unix_ns for entry in again] == [5, 77]
        assert times.generation("k") == generation
        times.close()


async def test_context_store_on_a_full_disk_says_so_and_keeps_nothing_half(tmp_path):
    with small_disk(tmp_path, "size=256k") as disk:
        async with ContextStore(disk / "context", keep_bytes=1 << 20) as store:
            data = os.urandom(300 << 10)
            digest = hashlib.sha256(data).digest()
            with pytest.raises(QuotaExceededError, match="cannot store the build context"):
                await store.run(store.store_sync, [(digest, data)])
            assert await store.run(store.missing_sync, [digest]) == [digest]
            assert [path for path in (disk / "context").rglob("*") if path.is_file()] == []


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

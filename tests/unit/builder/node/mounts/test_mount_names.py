"""Names, documents and patience of cache mounts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from offload_builder.buildkit.client import DiskRecord
from offload_builder.node.mounts.bundle import CacheDirectory
from offload_builder.node.mounts.documents import MountDocument, command_key
from offload_builder.node.mounts.naming import MountName, find_record, mount_id
from offload_builder.node.mounts.restoring import Pace, Patience
from offload_builder.node.mounts.usage import BuildMounts, common_scopes
from offload_cache.keys import mount_key
from offload_core.errors import UsageError

NAME = MountName("//cache", "", "linux/amd64")
DOCUMENT = MountDocument(
    NAME,
    "main",
    "sha256:" + "a" * 64,
    (("sha256:" + "a" * 64, 10), ("sha256:" + "b" * 64, 20)),
    3,
    500 << 20,
    "node-1",
    "build",
    datetime(2026, 1, 2, tzinfo=UTC),
    {"c": 10.0},
    {"d": 1.0},
)


def record(name: str, description: str, created_at: float = 100.0) -> DiskRecord:
    return DiskRecord(
        id=name, size_bytes=0, kind="exec.cachemount", description=description, in_use=True,
        mutable=True, shared=False, usage_count=0, created_at=created_at, last_used_at=0,
        parents=(),
    )  # fmt: skip


def directory(destination: str, created_at: float | None = 100.0) -> CacheDirectory:
    path = Path("/root/snapshots/5")
    return CacheDirectory(destination, path, path / "fs", path / "fs", "", created_at)


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ('cached mount /root/.cache from exec /bin/sh -c go build with id "//root/.cache"',
         "//root/.cache"),
        ('cached mount /c from exec sh with id "ns/a\\"b"', 'ns/a"b'),
        ('cached mount /c from exec sh with id "x\\x01"', 'x\\x01"'),
        ("cached mount /own from exec /bin/sh -c true", "/own"),
        ("mount / from exec sh", None),
    ],
)  # fmt: skip
def test_id_is_read_from_the_description(description: str, name: str | None) -> None:
    assert mount_id(record("r", description)) == name


def test_record_is_found_by_time_place_and_command() -> None:
    mine = 'cached mount /c from exec sh -c make with id "/one"'
    records = [
        record("late", 'cached mount /c from exec sh -c make with id "/two"', 200.0),
        record("place", 'cached mount /d from exec sh -c make with id "/three"', 100.1),
        record("mine", mine, 100.2),
    ]
    arguments = ("sh", "-c", "make")
    found = find_record(directory("/c"), arguments, records, ())
    assert found is not None and found.id == "mine"
    assert find_record(directory("/c"), arguments, records[:2], ()) is records[1]
    assert find_record(directory("/c"), arguments, records, ("mine", "place")) is None
    twins = [record("a", mine), record("b", mine.replace("one", "other"))]
    assert find_record(directory("/c"), arguments, twins, ()) is None
    assert find_record(directory("/x", None), arguments, records, ()) is None


def test_document_comes_back_as_it_was_and_damage_is_refused() -> None:
    assert MountDocument.decode(DOCUMENT.encode()) == DOCUMENT
    for data in (b"", b"[]", b"{}", DOCUMENT.encode().replace(b'"tree":"sha256:a', b'"tree":"x')):
        with pytest.raises(UsageError):
            MountDocument.decode(data)


def test_key_tells_mounts_scopes_and_platforms_apart() -> None:
    names = [NAME, replace(NAME, base="5:0:755"), replace(NAME, platform="linux/arm64")]
    keys = {mount_key("p", scope, name.key) for name in names for scope in ("a", "a/b")}
    assert len(keys) == 6
    assert mount_key("p", "a/b", NAME.key) == f"projects/p/mounts/a%2Fb/{NAME.key}"


def test_step_waits_no_longer_than_the_mount_can_save() -> None:
    assert Patience.of(DOCUMENT, "c") == Patience(5.0, 1.0)
    assert Patience.of(replace(DOCUMENT, cold={"c": 0.1}), "c") == Patience(1.0, 1.0)
    assert Patience.of(DOCUMENT, "other").limit == 5.0
    assert Patience.of(replace(DOCUMENT, warm={"c": 9.0}), "c").limit == 1.0
    assert Patience.of(replace(DOCUMENT, warm={"c": 12.0}), "c").limit == 0.0
    assert Patience.of(replace(DOCUMENT, cold={}), "c").limit == 1.0


def test_pace_is_learned_and_forgotten() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    usual = pace.estimate(DOCUMENT)
    pace.note(DOCUMENT, 50.0)
    assert pace.estimate(DOCUMENT) == pytest.approx(50.15)
    now = 700.0
    assert pace.estimate(DOCUMENT) == usual


def test_steps_get_what_all_running_builds_may_read() -> None:
    one = BuildMounts(("mine", "main", "team"), "mine", "1")
    two = BuildMounts(("main", "team"), "", "2")
    assert common_scopes([one]) == ("mine", "main", "team")
    assert common_scopes([one, two]) == ("main", "team")
    assert common_scopes([]) == ()
    assert command_key(("a", "b")) != command_key(("a b",))

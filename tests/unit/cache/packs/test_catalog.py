from __future__ import annotations

import os
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from offload_cache.packs.catalog import PackCatalog
from offload_cache.packs.layout import Frame, PackIndex

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[PackCatalog]:
    opened = PackCatalog(tmp_path / "share" / "catalog.db")
    opened.open()
    yield opened
    opened.close()


def digests(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


def pack(names: list[bytes], *, per_frame: int = 10, size: int = 100) -> PackIndex:
    """Return an index that holds blobs of one size."""
    parts = [names[at : at + per_frame] for at in range(0, len(names), per_frame)]
    return PackIndex(
        [Frame(50 * len(part), size * len(part), len(part), False) for part in parts],
        [size] * len(names),
        b"".join(names),
    )


def test_blobs_are_found_where_their_pack_has_them(catalog: PackCatalog) -> None:
    names = digests(25)
    catalog.add("one", pack(names))
    assert catalog.present([names[3], *digests(5), names[24]]) == {names[3], names[24]}
    first, second = catalog.locate([names[24], names[3], *digests(2), names[1]])
    assert (first.pack, first.position, first.stored_bytes, first.size_bytes) == (
        "one",
        0,
        500,
        1000,
    )
    assert [(blob.digest, blob.position) for blob in first.blobs] == [
        (names[1], 100),
        (names[3], 300),
    ]
    assert (second.position, second.size_bytes) == (1000, 500)
    assert catalog.counts() == (25, 1)


def test_many_blobs_are_found_in_one_question(catalog: PackCatalog) -> None:
    names = digests(5000)
    catalog.add("one", pack(names, per_frame=100))
    asked = names[::2] + digests(500)
    random.shuffle(asked)
    assert catalog.present(asked) == set(names[::2])
    assert sum(len(frame.blobs) for frame in catalog.locate(asked)) == 2500


def test_a_blob_of_several_packs_is_found_in_the_one_that_came_later(catalog: PackCatalog) -> None:
    names = digests(20)
    catalog.add("old", pack(names))
    before = catalog.next_frame()
    catalog.add("new", pack(names[:10]), replace_before=before)
    catalog.add("other", pack(names[:15]), replace_before=before)
    places = {blob.digest: place.pack for place in catalog.locate(names) for blob in place.blobs}
    assert [places[name] for name in names] == ["new"] * 10 + ["other"] * 5 + ["old"] * 5
    catalog.forget(["old"])
    assert catalog.present(names) == set(names[:15])


def test_a_pack_is_taken_in_once(catalog: PackCatalog) -> None:
    names = digests(5)
    catalog.add("one", pack(names))
    catalog.add("one", pack(digests(7)))
    assert catalog.counts() == (5, 1)


def test_a_rejected_pack_stays_known_and_has_no_blobs(catalog: PackCatalog) -> None:
    names = digests(5)
    catalog.add("one", pack(names))
    catalog.reject("one")
    catalog.reject("one")
    catalog.add("one", pack(names))
    assert catalog.present(names) == set()
    assert catalog.names() == {"one"}
    assert catalog.small_packs(1 << 20) == []
    catalog.forget(["one", "unknown"])
    assert catalog.names() == set()


def test_a_catalogue_is_there_after_a_restart(tmp_path: Path) -> None:
    names = digests(50)
    for _ in range(2):
        catalog = PackCatalog(tmp_path / "catalog.db")
        catalog.open()
        catalog.add("one", pack(names))
        assert catalog.present(names) == set(names)
        catalog.close()
        assert catalog.present(names) == set()


@pytest.mark.parametrize("damage", [b"no database", bytes(8192)])
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(damage)
    catalog = PackCatalog(path)
    catalog.open()
    names = digests(5)
    catalog.add("one", pack(names))
    assert catalog.present(names) == set(names)
    catalog.close()


def test_a_file_that_is_damaged_in_use_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = PackCatalog(path)
    catalog.open()
    names = digests(20_000)
    catalog.add("one", pack(names, per_frame=100))
    catalog.close()
    data = bytearray(path.read_bytes())
    data[8192:-8192] = os.urandom(len(data) - 16384)
    path.write_bytes(data)
    catalog.open()
    catalog.mark_listed()
    for name in range(3):
        catalog.present(names)
        catalog.add(f"pack {name}", pack(digests(100)))
    assert catalog.listed_at == 0, "all packs must be listed again"
    fresh = digests(5)
    catalog.add("fresh", pack(fresh))
    assert catalog.present(fresh) == set(fresh)
    catalog.close()


def test_a_folder_that_cannot_be_used_leaves_a_catalogue_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    catalog = PackCatalog(tmp_path / "file" / "catalog.db")
    catalog.open()
    names = digests(5)
    catalog.add("one", pack(names))
    assert catalog.present(names) == set(names)
    catalog.close()


def test_a_hundred_thousand_blobs_take_little_memory(catalog: PackCatalog) -> None:
    kept = []
    tracemalloc.start()
    for number in range(5):
        names = digests(20_000)
        kept += names[:100]
        catalog.add(f"pack {number}", pack(names, per_frame=500))
        del names
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(catalog.present(kept)) == 500
    assert held < 1 << 20

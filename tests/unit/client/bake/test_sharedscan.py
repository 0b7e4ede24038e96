"""Contexts that several targets scan together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from offload_client.bake.sharedscan import FRESH_SECONDS, SharedContexts
from offload_client.context.entries import tree_entries
from offload_client.context.source import DirectorySource, Selection
from offload_core.errors import ContextError

if TYPE_CHECKING:
    from pathlib import Path

    from offload_client.context.source import ContextSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(300):
        path = tmp_path / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(number))
    return tmp_path


def sources(shared: SharedContexts, folder: Path, count: int) -> list[ContextSource]:
    return [
        shared.share({"context": DirectorySource(folder, index_path=None)})["context"]
        for _ in range(count)
    ]


def names(source: ContextSource, selection: Selection | None = None) -> list[str]:
    found = source.scan(selection or Selection(), warn=lambda _text: None)
    return [entry.path for entry in tree_entries(found)]


def test_targets_at_the_same_time_scan_once(folder: Path):
    shared = SharedContexts()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(names, sources(shared, folder, 8)))
    assert found == [names(DirectorySource(folder, index_path=None))] * 8
    assert shared.scans == 1


def test_other_selection_is_another_scan(folder: Path):
    shared = SharedContexts()
    first, second = sources(shared, folder, 2)
    assert len(names(first)) == 307
    assert len(names(second, Selection(exclude=["d1"]))) < 307
    assert shared.scans == 2


def test_later_target_sees_what_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    shared = SharedContexts()
    first, second = sources(shared, folder, 2)
    before = names(first)
    monkeypatch.setattr("offload_client.bake.sharedscan.FRESH_SECONDS", -1.0)
    (folder / "new").write_text("x")
    assert names(second) == [*before, "new"]
    assert FRESH_SECONDS > 0


def test_scan_goes_on_for_the_others_when_one_gives_up(folder: Path):
    shared = SharedContexts()
    first, second = sources(shared, folder, 2)
    early = first.scan(Selection(), warn=lambda _text: None)
    next(iter(early))
    early.close()
    assert len(names(second)) == 307


def test_content_is_read_by_each(folder: Path):
    shared = SharedContexts()
    (source,) = sources(shared, folder, 1)
    names(source)
    with source.open() as one, source.open() as other:
        assert one is not other


def test_error_reaches_everybody(tmp_path: Path):
    shared = SharedContexts()
    ready = threading.Barrier(2)

    def scan(source: ContextSource) -> str:
        ready.wait(10)
        with pytest.raises(ContextError) as caught:
            names(source)
        return caught.value.message

    with ThreadPoolExecutor(2) as threads:
        messages = list(threads.map(scan, sources(shared, tmp_path / "nosuch", 2)))
    assert messages[0] == messages[1]

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_builder.node.exportledger import ExportLedger

if TYPE_CHECKING:
    from pathlib import Path

MAIN, FEATURE = "p/main", "p/feature"


@pytest.fixture
def ledger(tmp_path: Path) -> ExportLedger:
    return ExportLedger(tmp_path / "exports.json")


def export(ledger: ExportLedger, scope: str, key: str = "k") -> None:
    ledger.begin(scope, key)
    ledger.done(scope, key)


def test_what_never_ran_here_counts_as_exported(ledger: ExportLedger) -> None:
    assert ledger.is_exported(MAIN, "k")


def test_each_scope_gets_what_ran_once(ledger: ExportLedger) -> None:
    ledger.ran("k")
    export(ledger, FEATURE)
    assert ledger.is_exported(FEATURE, "k")
    assert not ledger.is_exported(MAIN, "k")
    assert ledger.is_exported(MAIN, "other")
    export(ledger, MAIN)
    assert ledger.is_exported(MAIN, "k")
    ledger.ran("k")
    assert not ledger.is_exported(FEATURE, "k")


def test_a_failed_export_is_made_up_for(ledger: ExportLedger) -> None:
    ledger.ran("k")
    ledger.begin(MAIN, "k")
    assert ledger.is_exported(MAIN, "k")  # it is under way
    ledger.failed(MAIN, "k")
    assert not ledger.is_exported(MAIN, "k")
    assert ledger.is_exported(MAIN, "other")
    export(ledger, MAIN)
    assert ledger.is_exported(MAIN, "k")
    ledger.failed(MAIN, "k")  # the upload was given up
    assert not ledger.is_exported(MAIN, "k")


def test_what_a_dead_node_was_exporting_is_exported_later(tmp_path: Path) -> None:
    path = tmp_path / "exports.json"
    ledger = ExportLedger(path)
    export(ledger, FEATURE)
    ledger.begin(MAIN, "k")
    again = ExportLedger(path)
    again.load()
    assert not again.is_exported(MAIN, "k")
    assert again.is_exported(FEATURE, "k")
    export(again, MAIN)
    last = ExportLedger(path)
    last.load()
    assert last.is_exported(MAIN, "k")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_a_damaged_file_means_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "exports.json"
    path.write_bytes(content)
    ledger = ExportLedger(path)
    ledger.load()
    assert ledger.is_exported(MAIN, "k")


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    ledger = ExportLedger(tmp_path / "missing" / "exports.json")
    ledger.load()
    export(ledger, MAIN)
    assert ledger.is_exported(MAIN, "k")


def test_it_does_not_grow_without_bound(
    ledger: ExportLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_builder.node.exportledger.MAX_KEYS", 3)
    for number in range(10):
        ledger.ran(f"k{number}")
        if number < 8:
            export(ledger, MAIN, f"k{number}")
    exported = [ledger.is_exported(MAIN, f"k{number}") for number in range(10)]
    assert exported == [*[True] * 8, False, False]


def test_what_is_exported_with_its_build_is_known(tmp_path):
    ledger = ExportLedger(tmp_path / "exports.json")
    ledger.ran("key")
    assert not ledger.is_exported("team", "key")
    ledger.made("team", "key")
    assert ledger.is_exported("team", "key")
    ledger.failed("team", "key")
    assert not ledger.is_exported("team", "key")
    ledger.made("team", "key")
    assert ledger.is_exported("team", "key")

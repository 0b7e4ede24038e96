"""What one BuildKit has by itself, over restarts and damages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_builder.buildkit.client import DiskRecord
from offload_builder.node.ownresults import FILE_NAME, MAX_CONTRIBUTIONS, OwnResults

if TYPE_CHECKING:
    from pathlib import Path


def record(
    name: str, kind: str = "regular", description: str = "", *, mutable: bool = False
) -> DiskRecord:
    return DiskRecord(
        id=name, size_bytes=1, kind=kind, description=description, in_use=False, mutable=mutable,
        shared=False, usage_count=1, created_at=0.0, last_used_at=0.0, parents=(),
    )  # fmt: skip


def test_import_of_own_contributions_gives_nothing_and_of_others_something(tmp_path: Path):
    own = OwnResults(tmp_path)
    assert own.hold_all([])
    own.add("mine")
    assert own.hold_all(["mine"])
    assert not own.hold_all(["mine", "theirs"])


def test_who_has_imported_needs_imports_for_ever(tmp_path: Path):
    own = OwnResults(tmp_path)
    own.add("mine")
    own.imported()
    assert not own.hold_all(["mine"])
    own.add("mine")
    assert not OwnResults(tmp_path).hold_all(["mine"])


def test_what_is_known_outlives_a_restart(tmp_path: Path):
    own = OwnResults(tmp_path)
    own.add("mine")
    own.look([record("a")])
    (tmp_path / "runc-overlayfs").mkdir()
    again = OwnResults(tmp_path)
    assert again.hold_all(["mine"])
    again.look([record("b")])
    assert not again.hold_all(["mine"])


def test_state_of_an_unknown_past_may_have_imported(tmp_path: Path):
    (tmp_path / "runc-overlayfs").mkdir()
    assert not OwnResults(tmp_path).hold_all([])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "contributions": 3, "records": []}',
     '{"version": 2, "whole": true, "contributions": ["mine"], "records": []}'],
)  # fmt: skip
def test_damaged_file_counts_as_an_unknown_past(tmp_path: Path, text: str):
    (tmp_path / "runc-overlayfs").mkdir()
    (tmp_path / FILE_NAME).write_text(text)
    assert not OwnResults(tmp_path).hold_all(["mine"])


def test_removed_result_is_missed_and_other_records_are_not(tmp_path: Path):
    own = OwnResults(tmp_path)
    own.add("mine")
    view = record("v", description="local source for context")
    passing = [record("s", "source.local"), record("m", mutable=True), view]
    own.look([record("a"), record("b"), *passing])
    own.look([record("a"), record("b"), record("c")])
    assert own.hold_all(["mine"])
    own.look([record("a"), record("c")])
    assert not own.hold_all(["mine"])


def test_look_is_due_after_builds_only(tmp_path: Path):
    own = OwnResults(tmp_path)
    assert not own.look_due
    own.built()
    assert own.look_due
    own.look([])
    assert not own.look_due
    own.built()
    own.imported()
    assert not own.look_due


def test_list_of_contributions_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("offload_builder.node.ownresults.MAX_CONTRIBUTIONS", 3)
    assert MAX_CONTRIBUTIONS > 3
    own = OwnResults(tmp_path)
    for name in "abcd":
        own.add(name)
    assert own.hold_all("bcd")
    assert not own.hold_all("a")


def test_directory_that_cannot_be_written_makes_imports_necessary(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    own = OwnResults(blocked / "buildkit")
    own.add("mine")
    assert not own.hold_all(["mine"])

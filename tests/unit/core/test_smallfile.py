"""Small files are replaced as a whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("durable", [False, True])
def test_content_is_replaced_and_nothing_else_left(tmp_path: Path, durable: bool):
    path = tmp_path / "state.json"
    for data in (b"old and longer", b"new"):
        replace_small_file(path, data, durable=durable)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_cannot_be_replaced_stays_and_the_scratch_goes(tmp_path: Path):
    path = tmp_path / "state.json"
    (path / "in-the-way").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        replace_small_file(path, b"new")
    assert [item.name for item in tmp_path.iterdir()] == ["state.json"]


def test_what_a_crash_left_goes_with_the_next_write(tmp_path: Path):
    path = tmp_path / "state.json"
    path.with_name("state.json.new").write_bytes(b"half")
    replace_small_file(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]

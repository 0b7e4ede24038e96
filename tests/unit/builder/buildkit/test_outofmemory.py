"""Which step ran out of memory is told from what the program in runc's place has written."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from offload_builder.buildkit.outofmemory import FOLDER, OutOfMemory, find_out_of_memory

MESSAGE = (
    'process "/bin/sh -c echo \\"a\\tb\\" && make" did not complete successfully: exit code: 2'
)
COMMAND = ["/bin/sh", "-c", 'echo "a\tb" && make']


def record(root: Path, name: str, limit: str, peak: str, command: list[str]) -> Path:
    (root / FOLDER).mkdir(exist_ok=True)
    path = root / FOLDER / name
    path.write_text(f"{limit} {peak} {json.dumps(command)}\n")
    return path


def test_step_is_found_by_its_command_and_time(tmp_path):
    record(tmp_path, "other", "1000", "1000", ["/bin/sh", "-c", "make"])
    record(tmp_path, "mine", "67108864", "67100000", COMMAND)
    old = record(tmp_path, "old", "5", "5", COMMAND)
    os.utime(old, (time.time() - 10_000,) * 2)
    assert find_out_of_memory(tmp_path, MESSAGE, time.time() - 60) == OutOfMemory(
        67108864, 67100000
    )
    assert not old.exists()
    assert find_out_of_memory(tmp_path, MESSAGE, time.time() + 60) is None
    assert find_out_of_memory(tmp_path / "none", MESSAGE, 0) is None


def test_step_without_a_limit_says_that_the_node_ran_out_of_memory(tmp_path):
    for limit in ("9223372036854771712", "max"):
        record(tmp_path, "mine", limit, "0", COMMAND)
        found = find_out_of_memory(tmp_path, MESSAGE, 0)
        assert found == OutOfMemory(0, 0)
        assert found.describe().startswith("The node ran out of memory")


def test_half_written_and_strange_records_are_passed_over(tmp_path):
    record(tmp_path, "x", "1", "1", COMMAND).write_text("12")
    assert find_out_of_memory(tmp_path, MESSAGE, 0) is None

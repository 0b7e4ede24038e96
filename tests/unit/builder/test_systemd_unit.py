"""The unit for a node as a service."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from offload_builder.node.privileges import KEPT

UNIT = Path(__file__).resolve().parents[3] / "deploy/systemd/offload-node.service"


def test_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/usr/local/bin/offload-builder", sys.executable)
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if UNIT.stem in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_unit_leaves_the_capabilities_that_the_agent_keeps() -> None:
    lists = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    named = {name.removeprefix("CAP_").lower() for line in lists for name in line.split()}
    assert named == set(KEPT)

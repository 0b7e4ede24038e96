"""Control groups of engines in version 2, as plain files."""

from __future__ import annotations

from offload_builder.node.sessions.contract import EngineLimits
from offload_builder.node.sessions.engine.groups import OWN, EngineGroups

LIMITS = EngineLimits(cpu_millis=1500, memory_bytes=1 << 30, disk_bytes=1 << 30, pids=300)
FILES = ("cpu.max", "memory.max", "memory.swap.max", "pids.max", "cgroup.max.descendants")


def test_everything_in_an_engine_is_bounded_above_what_it_can_write_to(tmp_path):
    (tmp_path / "cgroup.procs").write_text("")
    groups = EngineGroups(tmp_path / "data", "e", tmp_path)
    ((_, own),) = groups.own()
    upper = tmp_path.joinpath(own).parent
    (upper / OWN).mkdir(parents=True)
    for name in FILES:
        (upper / name).write_text("")

    groups.limit(LIMITS)

    assert groups.unified
    assert {name: (upper / name).read_text() for name in FILES} == {
        "cpu.max": "150000 100000", "memory.max": str(1 << 30), "memory.swap.max": "0",
        "pids.max": "300", "cgroup.max.descendants": "4096",
    }  # fmt: skip

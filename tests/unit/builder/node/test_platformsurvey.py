"""What a node says it builds."""

from __future__ import annotations

from offload_builder.node.platformsurvey import sort_platforms


def test_what_the_processor_runs_is_native_and_the_rest_is_emulated() -> None:
    found = sort_platforms(
        "linux/amd64",
        ["linux/amd64", "linux/amd64/v2", "linux/386", "linux/arm64", "linux/riscv64"],
        ["linux/s390x", "linux/arm64"],
        ["linux/riscv64"],
    )
    assert list(found.native) == ["linux/amd64", "linux/amd64/v2", "linux/386"]
    assert list(found.emulated) == ["linux/arm64", "linux/riscv64", "linux/s390x"]


def test_the_machines_own_platform_is_first_and_always_there() -> None:
    found = sort_platforms("linux/arm64", ["linux/amd64", "linux/arm64"], [], [])
    assert list(found.native) == ["linux/arm64"]
    assert list(found.emulated) == ["linux/amd64"]

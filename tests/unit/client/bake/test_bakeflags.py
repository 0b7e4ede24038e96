"""Flags of `offload-build bake` that docker has for all of buildx."""

from __future__ import annotations

from offload_client.cli.bake import parse_bake
from offload_client.invocation import Invocation


def test_builder_is_ignored_with_a_warning_and_debug_is_taken() -> None:
    request = parse_bake(Invocation.of_process(["bake", "--builder", "x", "-D", "app"]))
    assert request is not None
    assert request.debug
    assert request.targets == ["app"]
    (remark,) = request.remarks
    assert remark.startswith("--builder x is ignored")

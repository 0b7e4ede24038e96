"""Which sessions belong to a build of a BuildKit client."""

from __future__ import annotations

import pytest

from offload_builder.buildkit.controlapi import SolveOrder
from offload_builder.node.proxy.builds import ClientBuild, shared_sessions


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ({"target": "app"}, set()),
        ({"local-sessionid:context": "s1", "local-sessionid:dockerfile": "s2"}, {"s1", "s2"}),
        ({"local-sessionid:context": "name:s1"}, {"s1"}),
        ({"local-sessionid:context": ""}, set()),
    ],
)
def test_shared_sessions_are_those_that_directories_come_from(
    attributes: dict[str, str], found: set[str]
) -> None:
    assert shared_sessions(attributes) == found


def test_a_build_that_is_not_admitted_serves_no_session() -> None:
    build = ClientBuild("ref")
    build.begin(SolveOrder("ref", session="s", attributes={"local-sessionid:context": "t"}))
    assert not build.serves("s")
    assert not build.serves("t")
    assert build.owns("s")
    assert not build.owns("t")

"""What is built while somebody has a session can be run in it, wherever that is."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.sessionpool import SessionMember, SessionPool

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ann() -> Iterator[SessionMember]:
    """Somebody in a pool of two nodes, which can be told apart."""
    with SessionPool("one", node={"OFFLOAD_NODE_LABELS": "which=one"}) as pool:
        pool.start_node("two", OFFLOAD_NODE_LABELS="which=two")
        member = pool.member("ann")
        shutil.copy("/bin/busybox", member.home)
        yield member


@pytest.mark.parametrize("node", ["one", "two"])
def test_image_is_built_at_the_node_of_the_session(ann: SessionMember, node: str) -> None:
    ann.start(node, "--node-label", f"which={node}", load=False)
    (ann.home / "Dockerfile").write_text(
        f'FROM scratch\nCOPY busybox /busybox\nCMD ["/busybox", "echo", "built for {node}"]\n'
    )
    done = ann.build("-t", f"app-{node}", ".")
    assert done.returncode == 0, done.stderr
    assert ann.docker_well("run", "--rm", f"app-{node}") == f"built for {node}\n"
    rows = ann.well("images", node, "--format", "{{.Name}} {{.Node}} {{.AtHand}}").splitlines()
    assert any(f"app-{node}" in row and row.endswith(f" {node} yes") for row in rows), rows
    ann.well("stop", node, "--force")

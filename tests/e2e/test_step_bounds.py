"""What a user sees of the bounds and rights that a node sets: sentences and exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fixtures.contexts import make_context
from tests.fixtures.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HUNGRY = "RUN head -c 200000000 /dev/zero | tail -c 200000000 > /dev/null; exit 2\n"


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A pool whose node gives each step 64 MiB, and the network but no more rights."""
    config = tmp_path_factory.mktemp("config") / "node.toml"
    config.write_text('step_memory_max = "64MiB"\nentitlements = ["network.host"]\n')
    with Pool(1, "--node-config", str(config)) as running:
        yield running


def test_step_that_runs_out_of_memory_ends_the_build_with_its_own_exit_code(
    bounded: Pool, tmp_path: Path
) -> None:
    done = bounded.member().build(make_context(tmp_path / "c", HUNGRY))
    assert done.returncode == 9, done.stderr
    assert "exit code: 2" in done.stderr
    assert "more than its limit of 64MiB (its peak was 6" in done.stderr


def test_right_that_the_node_does_not_permit_is_refused_with_who_can(
    bounded: Pool, tmp_path: Path
) -> None:
    member = bounded.member()
    folder = make_context(tmp_path / "c", "RUN --network=host true\n")
    done = member.build("--allow", "network.host", folder)
    assert done.returncode == 0, done.stderr
    done = member.build("--no-cache", folder)
    assert done.returncode == 1
    assert "network.host is not allowed" in done.stderr
    assert "Give --allow network.host" in done.stderr
    done = member.build("--allow", "security.insecure", folder)
    assert done.returncode == 4
    assert 'entitlements = ["security.insecure"] in its configuration' in done.stderr
    done = member.build("--allow", "everything", folder)
    assert done.returncode == 1 and "unknown entitlement everything" in done.stderr

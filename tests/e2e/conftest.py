"""One pool for all end-to-end tests of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fixtures.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two nodes, MinIO, one gateway."""
    with Pool(2, "--minio") as running:
        yield running


@pytest.fixture
def member(pool: Pool, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Somebody who is logged in; on failure the pool's logs are shown."""
    found = pool.member()
    yield found
    report = getattr(request.node, "report_of_call", None)
    if report is not None and report.failed:
        print(pool.tails())

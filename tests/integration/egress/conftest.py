"""What the tests of the firewall share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fixtures.bypasslab import Outcome, try_all
from tests.fixtures.egressworld import World, watched_firewall


@pytest.fixture
async def world():
    async with World() as one:
        yield one


@pytest.fixture
async def watched(world, tmp_path):
    async with watched_firewall(world, tmp_path) as one:
        yield one


@pytest.fixture(scope="session")
def outcome() -> Outcome:
    """What came of all ways around the firewall, tried once for all tests."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(try_all).result()

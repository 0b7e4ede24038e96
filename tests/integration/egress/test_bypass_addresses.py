"""Ways around the firewall by addresses, from steps of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.bypasslab import GOOD, Outcome, arrived, filled
from tests.fixtures.bypassways import ADDRESSES, PROXY, SHARED, WAYS, Way
from tests.fixtures.egressworld import ALLOWED, ALLOWED6


@pytest.mark.parametrize("way", ADDRESSES, ids=lambda way: way.name)
def test_no_way_by_addresses_leads_anywhere(outcome: Outcome, way: Way) -> None:
    for kind in way.only:
        result = outcome.results[kind][filled(way.place, outcome.places)]
        assert result.startswith(way.ends), (kind, result)
    for target in way.targets:
        assert not arrived(outcome, target)


def test_what_is_allowed_is_reached_by_all_steps(outcome: Outcome) -> None:
    for kind, results in outcome.results.items():
        assert all(results[place].startswith("ok") for place in GOOD), (kind, results)
        reached = {place for place, result in results.items() if result.startswith("ok")}
        assert len(reached - set(GOOD)) == (kind != "step"), kind  # The project's own registry.


def test_nothing_but_what_is_allowed_came_out_of_the_router(outcome: Outcome) -> None:
    assert outcome.packets == []
    assert {server for server, _ in outcome.requests} <= {ALLOWED, ALLOWED6, SHARED, PROXY}


def test_every_way_is_told_of_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "egress-bypass.md").read_text()
    missing = [way.name for way in WAYS if f"`{way.name}`" not in text]
    assert missing == []

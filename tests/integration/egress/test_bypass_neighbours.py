"""Ways to other projects of a node, and to what a project has of its own."""

from __future__ import annotations

import pytest

from tests.fixtures.bypasslab import Outcome, arrived, filled
from tests.fixtures.bypassways import NEIGHBOURS, Way


@pytest.mark.parametrize("way", NEIGHBOURS, ids=lambda way: way.name)
def test_no_way_leads_to_neighbours(outcome: Outcome, way: Way) -> None:
    for kind in way.only:
        result = outcome.results[kind][filled(way.place, outcome.places)]
        assert result.startswith(way.ends), (kind, result)
    for target in way.targets:
        assert not arrived(outcome, target)


def test_nobody_came_to_the_neighbour(outcome: Outcome) -> None:
    assert outcome.visitors == []

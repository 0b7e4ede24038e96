"""Ways around the firewall by other protocols than TCP, and by other resolvers."""

from __future__ import annotations

import pytest

from tests.fixtures.bypasslab import Outcome, arrived, filled
from tests.fixtures.bypassways import PROTOCOLS, Way


@pytest.mark.parametrize("way", PROTOCOLS, ids=lambda way: way.name)
def test_no_way_by_protocols_leads_anywhere(outcome: Outcome, way: Way) -> None:
    for kind in way.only:
        result = outcome.results[kind][filled(way.place, outcome.places)]
        assert result.startswith(way.ends), (kind, result)
    for target in way.targets:
        assert not arrived(outcome, target)

"""Ways around the firewall by names: tunnels, rebinding, redirects."""

from __future__ import annotations

import pytest

from tests.fixtures.bypasslab import SOURCES, Outcome, arrived, filled
from tests.fixtures.bypassways import NAMED, Way
from tests.fixtures.egressworld import DENIED, METADATA


@pytest.mark.parametrize("way", NAMED, ids=lambda way: way.name)
def test_no_way_by_names_leads_anywhere(outcome: Outcome, way: Way) -> None:
    for kind in way.only:
        result = outcome.results[kind][filled(way.place, outcome.places)]
        assert result.startswith(way.ends), (kind, result)
    for target in way.targets:
        assert not arrived(outcome, target)
    assert way.asks.lower() not in outcome.asked or not way.asks


@pytest.mark.parametrize("name", SOURCES)
def test_sources_of_buildkit_lead_nowhere_else(outcome: Outcome, name: str) -> None:
    assert (outcome.sources[name] == "") == name.endswith("-allowed"), outcome.sources[name]
    assert not arrived(outcome, DENIED)
    assert not arrived(outcome, METADATA)

"""When sessions are paused, removed and ended, with a clock of the test's own."""

from __future__ import annotations

import pytest

from offload_builder.node.sessions.contract import EngineLimits
from offload_builder.node.sessions.lifetime import Due, Lifetime
from offload_builder.node.sessions.limits import GivenLimits

LIMITS = GivenLimits(EngineLimits(1000, 1, 1, 1), 300.0, 600.0, 3600.0)


@pytest.fixture
def life() -> Lifetime:
    return Lifetime(LIMITS, ready_at=1000.0)


def test_an_unused_session_is_paused_after_its_idle_time_and_removed_after_its_grace(life):
    assert life.due(1299.9) is None
    assert life.due(1300.0) is Due.PAUSE
    life.pause(1301.0)
    assert life.due(1900.9) is None
    assert life.removed_at == 1901.0
    assert life.due(1901.0) is Due.REMOVE


def test_use_puts_the_pause_off_until_it_is_over(life):
    life.use(1100.0, in_use=True)
    assert life.pauses_at is None
    assert life.due(2000.0) is None
    life.use(2000.0, in_use=False)
    assert life.pauses_at == 2300.0


def test_what_counts_as_no_use_puts_nothing_off(life):
    life.use(1200.0, in_use=False)
    assert life.pauses_at == 1300.0


def test_time_in_pause_does_not_count(life):
    assert life.used(1100.0) == 100.0
    life.pause(1300.0)
    assert life.used(1500.0) == 300.0
    life.wake(1600.0)
    assert life.used(1650.0) == 350.0
    assert life.pauses_at == 1900.0


def test_the_end_of_its_time_comes_in_use_and_in_pause(life):
    life.use(1000.0, in_use=True)
    assert life.due(4599.0) is None
    assert life.due(4600.0) is Due.END
    life.use(4000.0, in_use=False)
    life.pause(4500.0)
    assert life.removed_at == 4600.0
    assert life.due(4600.0) is Due.END


def test_warnings_come_five_minutes_and_one_minute_before_the_end_once_each(life):
    life.use(1000.0, in_use=True)
    assert life.warning(4299.0) == ""
    assert "5m0s" in life.warning(4300.0)
    assert life.warning(4301.0) == ""
    assert "59.0s" in life.warning(4541.0)
    assert life.warning(4550.0) == ""


def test_a_session_shorter_than_a_warning_does_not_begin_with_it():
    life = Lifetime(GivenLimits(LIMITS.engine, 300.0, 600.0, 120.0), ready_at=0.0)
    life.use(0.0, in_use=True)
    assert life.warning(1.0) == ""
    assert "ends in" in life.warning(60.0)


def test_a_warning_comes_a_minute_before_each_pause(life):
    assert life.warning(1239.0) == ""
    assert "paused in 1m0s" in life.warning(1240.0)
    assert life.warning(1250.0) == ""
    life.touch(1260.0)
    assert "paused in" in life.warning(1500.0)


def test_the_next_look_is_when_something_can_be_due(life):
    assert life.next_look(1000.0) == 1240.0
    assert life.next_look(1240.0) == 1300.0
    life.use(1250.0, in_use=True)
    assert life.next_look(1250.0) == 4300.0
    life.use(1260.0, in_use=False)
    life.pause(1560.0)
    assert life.next_look(1560.0) == 2160.0

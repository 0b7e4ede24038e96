from __future__ import annotations

import pytest

from offload_cache.health import REACHABLE, StoreHealth
from offload_core.errors import CacheUnavailableError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_calls_fail_at_once_after_consecutive_failures_and_one_probe_follows() -> None:
    clock, states = Clock(), []
    health = StoreHealth("s3", limit=2, pause_seconds=10, on_change=states.append, clock=clock)
    health.failed("no connection")
    health.check()
    health.failed("no connection")
    assert not health.reachable
    assert health.state == "the shared cache at s3 is not reachable: no connection"
    with pytest.raises(CacheUnavailableError):
        health.check()
    clock.now += 10
    health.check()  # the probe
    with pytest.raises(CacheUnavailableError):
        health.check()
    health.failed("still away")
    clock.now += 19  # the second pause is twice as long
    with pytest.raises(CacheUnavailableError):
        health.check()
    clock.now += 1
    health.check()
    health.succeeded()
    assert health.reachable
    assert states == ["the shared cache at s3 is not reachable: no connection", REACHABLE]


def test_a_success_between_failures_keeps_the_circuit_closed() -> None:
    health = StoreHealth("s3", limit=2)
    for _ in range(5):
        health.failed("x")
        health.succeeded()
    health.check()


def test_an_abandoned_probe_lets_the_next_caller_try() -> None:
    clock = Clock()
    health = StoreHealth("s3", limit=1, pause_seconds=1, clock=clock)
    health.failed("x")
    clock.now += 1
    health.check()
    health.abandoned()
    health.check()

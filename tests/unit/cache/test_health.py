from __future__ import annotations

import pytest

from offload_cache.circuits import StoreCircuits, Verb
from offload_cache.health import REACHABLE, StoreHealth
from offload_core.errors import CacheUnavailableError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_calls_fail_at_once_after_consecutive_failures_and_one_probe_follows() -> None:
    clock, states = Clock(), []
    health = StoreHealth(
        "s3", limit=2, pause_seconds=10, longest_pause_seconds=60, on_change=states.append,
        clock=clock,
    )  # fmt: skip
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


def test_a_store_that_is_only_half_well_is_left_alone_for_longer() -> None:
    clock = Clock()
    health = StoreHealth("s3", limit=1, pause_seconds=2, longest_pause_seconds=8, clock=clock)
    pauses = []
    for _ in range(4):
        health.failed("x")
        pauses.append(health.pause_left)
        clock.now += health.pause_left
        assert health.begin_probe()
        assert not health.begin_probe()
        health.succeeded()
    assert pauses == [2, 4, 8, 8]
    clock.now += 100
    health.failed("x")
    assert health.pause_left == 2


def test_calls_are_no_probes_where_something_else_probes() -> None:
    clock = Clock()
    health = StoreHealth("s3", limit=1, pause_seconds=1, calls_probe=False, clock=clock)
    health.failed("x")
    clock.now += 100
    assert not health.reachable
    with pytest.raises(CacheUnavailableError):
        health.check()
    assert health.begin_probe()


def test_failures_that_follow_each_other_are_one_warning(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    health = StoreHealth("s3", limit=3, pause_seconds=1, clock=clock)
    for _ in range(50):
        health.failed("no connection")
        clock.now += 0.5
    assert capsys.readouterr().out.count("[warning") == 1
    health.succeeded()
    clock.now += 60
    health.failed("no connection", weight=3)
    out = capsys.readouterr().out
    assert out.count("[warning") == 1
    assert out.count("cache.store.unreachable") == 1


def test_a_refused_verb_leaves_the_others_alone() -> None:
    circuits = StoreCircuits(StoreHealth("s3"))
    for _ in range(3):
        circuits.refused(Verb.DELETE, "access was refused (AccessDenied)")
    for _ in range(3):
        circuits.failed(Verb.PUT, "no answer")
    assert circuits.reachable
    assert circuits.state == "the shared cache at s3 takes no writes: no answer"
    for verb in (Verb.PUT, Verb.DELETE):
        with pytest.raises(CacheUnavailableError):
            circuits.check(verb)
    for verb in (Verb.GET, Verb.HEAD, Verb.LIST):
        circuits.check(verb)
    circuits.failed(Verb.LIST, "no answer in time", weight=3)
    assert not circuits.reachable
    assert circuits.state == "the shared cache at s3 is not reachable: no answer in time"

"""Limits on logins: by address, not to be escaped by many addresses, in bounded memory."""

from __future__ import annotations

import ipaddress

import pytest

from offload_builder.gateway import ratelimits
from offload_builder.gateway.config import GatewayConfig
from offload_builder.gateway.ratelimits import Limiter, LoginLimits, address_keys
from offload_core.errors import QuotaExceededError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limits(clock: Clock, **options: int) -> LoginLimits:
    return LoginLimits(GatewayConfig(**options), clock)


def allowed(login: LoginLimits, host: str, upto: int = 1000) -> int:
    """Return how many attempts in a row are allowed."""
    for number in range(upto):
        try:
            login.attempt(host)
        except QuotaExceededError:
            return number
    return upto


def test_so_many_are_allowed_at_once_and_more_as_time_goes_by(clock):
    login = limits(clock, login_attempts=6)
    assert allowed(login, "192.0.2.1") == 6
    clock.now += 10
    assert allowed(login, "192.0.2.1") == 1
    clock.now += 3600
    assert allowed(login, "192.0.2.1") == 6
    assert allowed(login, "192.0.2.2") == 6


def test_sentence_says_when_it_works_and_then_it_does(clock):
    login = limits(clock, login_attempts=2)
    allowed(login, "192.0.2.1")
    with pytest.raises(QuotaExceededError, match=r"from 192\.0\.2\.1; try again in 30") as caught:
        login.attempt("192.0.2.1")
    clock.now += caught.value.retry_after_seconds
    login.attempt("192.0.2.1")


def test_failures_count_apart(clock):
    login = limits(clock, login_failures=2)
    for _ in range(2):
        login.attempt("192.0.2.1")
        login.failed("192.0.2.1")
    assert allowed(login, "192.0.2.1") == 0
    clock.now += 30
    assert allowed(login, "192.0.2.1", 10) == 10


def test_addresses_of_one_ipv6_network_are_one(clock):
    login = limits(clock, login_attempts=5)
    hosts = [str(ipaddress.ip_address("2001:db8:1:2::") + n * 7919) for n in range(50)]
    assert sum(allowed(login, host, 1) for host in hosts) == 5


def test_networks_of_one_site_get_eight_times_as_much(clock):
    login = limits(clock, login_attempts=5)
    hosts = [f"2001:db8:1:{number:x}::1" for number in range(500)]
    assert sum(allowed(login, host, 1) for host in hosts) == 40


def test_mapped_ipv4_address_is_that_address():
    assert address_keys("::ffff:192.0.2.7") == address_keys("192.0.2.7")
    assert address_keys("fe80::1%eth0")[0] == ("fe80::/64", 1)
    assert address_keys("") == address_keys("rubbish")


def test_memory_is_bounded_and_late_comers_share_a_counter(clock, monkeypatch):
    monkeypatch.setattr(ratelimits, "MAX_KEYS", 100)
    limiter = Limiter(10, clock)
    for number in range(1000):
        limiter.count(f"host {number}")
    assert len(limiter) <= 101
    assert limiter.wait("another") > 0
    clock.now += 7200
    assert limiter.wait("another") == 0
    limiter.count("another")
    assert len(limiter) == 1


def test_no_bound_counts_nothing(clock):
    login = limits(clock, login_attempts=0, login_failures=0)
    for _ in range(100):
        login.failed("192.0.2.1")
    assert allowed(login, "192.0.2.1") == 1000

"""How often one may try to log in: by address, and how many certificates one token may get.

Addresses are counted by what one subscriber has: an IPv4 address, or an IPv6 network of 64 bits,
and, eight times as much, one of 48 bits, so that who has many networks gains little. The counters
follow the generic cell rate algorithm (ITU-T I.371): one number each.
"""

from __future__ import annotations

import math
import time
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.gateway.config import GatewayConfig

log = structlog.get_logger(__name__)

MAX_KEYS = 20_000
"""Addresses that are counted one by one, about 4 MB; any more share one counter."""
SITE_FACTOR = 8
_OVERFLOW = "others"
_MINUTE = 60.0


class Limiter:
    """Allows so many events per minute and key, all at once or one by one."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Set the number; 0 allows any."""
        self._interval = _MINUTE / per_minute if per_minute else 0.0
        self._clock = clock
        self._purged_at = -math.inf
        self._due: dict[str, float] = {}
        """By key, when everything that was counted is forgotten."""

    def __len__(self) -> int:
        return len(self._due)

    def wait(self, key: str, factor: int = 1) -> float:
        """Return in how many seconds one more is allowed; 0 for now. Nothing is counted."""
        due = self._due.get(self._key(key), 0.0)
        return max(0.0, due + self._interval / factor - self._clock() - _MINUTE)

    def count(self, key: str, factor: int = 1) -> None:
        """Count one event."""
        if not self._interval:
            return
        key, now = self._key(key), self._clock()
        self._due[key] = max(self._due.get(key, 0.0), now) + self._interval / factor

    def _key(self, key: str) -> str:
        now = self._clock()
        if key not in self._due and len(self._due) >= MAX_KEYS and now - self._purged_at >= 1.0:
            self._purged_at = now
            self._due = {known: due for known, due in self._due.items() if due > now}
        return key if key in self._due or len(self._due) < MAX_KEYS else _OVERFLOW


def address_keys(host: str) -> list[tuple[str, int]]:
    """Return what an address is counted as, and how many times the limit that has."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return [("unknown", 1)]
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return [(str(address.ipv4_mapped), 1)]
        subnet, site = (IPv6Network((address, bits), strict=False) for bits in (64, 48))
        return [(str(subnet), 1), (str(site), SITE_FACTOR)]
    return [(str(address), 1)]


class LoginLimits:
    """The limits on everything that proves who somebody is."""

    def __init__(self, config: GatewayConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempts = Limiter(config.login_attempts, clock)
        self._failures = Limiter(config.login_failures, clock)
        self._certificates = Limiter(config.token_certificates, clock)

    def attempt(self, host: str) -> None:
        """Count an attempt from an address.

        Raises:
            QuotaExceededError: there were too many, or too many that failed.
        """
        keys = address_keys(host)
        wait = max(
            limiter.wait(key, factor)
            for limiter in (self._attempts, self._failures)
            for key, factor in keys
        )
        if wait > 0:
            raise _limited(f"too many attempts to log in came from {keys[0][0]}", wait)
        for key, factor in keys:
            self._attempts.count(key, factor)

    def failed(self, host: str) -> None:
        """Count an attempt that proved nothing."""
        for key, factor in address_keys(host):
            self._failures.count(key, factor)

    def certificate(self, token_id: str) -> None:
        """Count a certificate for the holder of a token.

        Only who has proved the token gets here: nobody who knows its id can keep its owner out.

        Raises:
            QuotaExceededError: it gets too many.
        """
        wait = self._certificates.wait(token_id)
        if wait > 0:
            raise _limited(f"the token {token_id} gets too many certificates", wait)
        self._certificates.count(token_id)


def _limited(sentence: str, wait: float) -> QuotaExceededError:
    seconds = math.ceil(wait)
    error = QuotaExceededError(f"{sentence}; try again in {seconds} seconds")
    error.retry_after_seconds = float(seconds)
    return error

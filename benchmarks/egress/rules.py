"""Policies of the benchmark: ten thousand rules of all kinds, and the places that are visited."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.egress.visits import DOMAIN
from benchmarks.model import BenchmarkError
from offload_builder.egress.policy.model import EffectivePolicy
from offload_builder.egress.policy.reading import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT = 10_000
SERVER = "203.0.113.10"
STREAMS, VISITS = 9100, 9101
_OPEN = 'posture = "open"\n'
_LIST = 'posture = "allowlist"\n'


def many(count: int = COUNT, *, ports: tuple[int, ...] = (STREAMS, VISITS)) -> str:
    """Return a policy of `count` rules that allows ports of our server and the names of ours.

    Half of the others are IPv4 networks, a fifth IPv6 networks, the rest hosts, of which each
    fourth stands for all names below; each tenth rule denies. All have ports.
    """
    ours = [
        _rule("ours", "allow", SERVER, ", ".join(map(str, ports))),
        _rule("names", "allow", f"*.{DOMAIN}", "443"),
    ][: max(1, count)]
    return _LIST + "".join([*ours, *_others(count - len(ours))])


def one() -> str:
    """Return a policy of one rule that allows our server."""
    return many(1)


def none() -> str:
    """Return a policy without any rule, which allows everything but protected ranges."""
    return _OPEN


def effective(text: str) -> EffectivePolicy:
    """Return a policy as the firewall takes it.

    Raises:
        BenchmarkError: it has mistakes.
    """
    reading = read_text(text, file="benchmark.toml")
    if reading.policy is None:
        raise BenchmarkError(f"the policy is wrong: {reading.findings[0]}")
    return EffectivePolicy(reading.policy)


def _others(count: int) -> Iterator[str]:
    for number in range(count):
        low, high = number % 250, number // 250
        if number % 10 < 5:
            target = f"45.{high}.{low}.0/24"
        elif number % 10 < 7:
            target = f"2a00:{high:x}:{low:x}::/48"
        else:
            target = f"{'*.' * (number % 4 == 0)}host{number}.example.com"
        verb = "deny" if number % 10 == 3 else "allow"
        yield _rule(f"r{number}", verb, target, '443, "8000-8100"')


def _rule(name: str, verb: str, target: str, ports: str) -> str:
    return f'\n[[rule]]\nid = "{name}"\n{verb} = ["{target}"]\nports = [{ports}]\n'

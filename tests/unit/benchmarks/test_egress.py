"""The parts of the benchmark `egress`."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.egress import rules
from benchmarks.egress.figures import quantile
from benchmarks.egress.ground import require_parts
from benchmarks.egress.steps import Taken, taken_of
from benchmarks.egress.streams import BLOCK_BYTES, block, digest_of, send
from benchmarks.egress.visits import connect
from benchmarks.model import BenchmarkError
from offload_builder.egress.policy.evaluate import evaluate
from offload_builder.egress.policy.model import Action, Attempt, HostTarget


def served(request: str) -> bytes:
    """Return what the server of streams says to a client."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=send, args=(theirs,))
    with ours:
        thread.start()
        ours.sendall(request.encode())
        found = b""
        while part := ours.recv(1 << 20):
            found += part
    thread.join()
    return found


def allowed(text: str, port: int) -> bool:
    """Return whether a policy allows a port of the server."""
    attempt = Attempt(None, ipaddress.ip_address(rules.SERVER), port)
    return evaluate(rules.effective(text).base, attempt).allowed


def test_policy_has_ten_thousand_rules_of_all_kinds() -> None:
    policy = rules.effective(rules.many()).base
    kinds = Counter(
        type(target).__name__ if isinstance(target, HostTarget) else f"v{target.network.version}"
        for rule in policy.rules
        for target in rule.targets
    )
    assert len(policy.rules) == rules.COUNT
    assert kinds["v4"] > 4_900
    assert kinds["v6"] > 1_900
    assert kinds["HostTarget"] > 2_900
    assert sum(rule.action is Action.DENY for rule in policy.rules) == 1_000
    networks = [network for rule in policy.rules for network in rule.networks]
    assert len(set(networks)) == len(networks)


@pytest.mark.parametrize("policy", [rules.many, rules.one, rules.none])
def test_every_policy_allows_the_server(policy: Callable[[], str]) -> None:
    assert allowed(policy(), rules.STREAMS)
    assert allowed(policy(), rules.VISITS)


def test_narrow_policy_denies_what_the_reload_tries() -> None:
    policy = rules.many(ports=(rules.STREAMS,))
    assert allowed(policy, rules.STREAMS)
    assert not allowed(policy, rules.VISITS)


def test_wrong_policy_ends_the_benchmark() -> None:
    with pytest.raises(BenchmarkError, match="the policy is wrong"):
        rules.effective("posture = 3")


def test_stream_is_as_long_as_asked_and_its_digest_is_known() -> None:
    assert served(f"{2 * BLOCK_BYTES} 0\n") == 2 * block()
    assert digest_of(2 * BLOCK_BYTES) != digest_of(BLOCK_BYTES)


def test_what_the_probe_says_of_a_stream_is_read() -> None:
    place = "take:203.0.113.10:9100/1048576"
    assert taken_of(f"#7 0.1\n{place} ok 1048576 0.5 0.01 abc\n", place) == Taken(
        1048576, 0.5, 0.01, "abc"
    )
    with pytest.raises(BenchmarkError, match="failed: refused"):
        taken_of(f"{place} refused\n", place)


def test_quantile_is_a_value_that_was_there() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert quantile(values, 0.5) == 50
    assert quantile(values, 0.99) == 99
    assert quantile([7.0], 0.99) == quantile([7.0], 0.0) == 7.0


def test_connections_are_timed_one_by_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = connect("127.0.0.1", listener.getsockname()[1], 5)
    assert len(found) == 5
    assert all(0 < seconds < 1 for seconds in found)


def test_missing_parts_are_named_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.egress.ground.TOOLS", tmp_path)
    with pytest.raises(BenchmarkError, match=r"buildkitd cannot be found; run 'make tools'"):
        require_parts()

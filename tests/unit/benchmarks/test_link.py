from __future__ import annotations

import pytest

from tests.fixtures.wan import Counters, other_end, parse_counters
from tests.fixtures.wanbridge import Lane

PACKET = bytes(1250)
"""10,000 bits."""
NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo:     120       2    0    0    0     0          0         0      120       2    0    0
  wan0: 7000000    9000    0    0    0     0          0         0   350000    4000    0    0
"""


def lane(
    rate_bits: float | None = None, delay: float = 0.0, queue: float = 0.1, *, cut: bool = False
) -> Lane:
    made = Lane()
    made.shape(rate_bits=rate_bits, delay_seconds=delay, queue_seconds=queue, cut=cut)
    return made


def arrivals(one: Lane, step: float = 0.001, end: float = 1.0) -> list[float]:
    """When each packet arrives, to a step."""
    found: list[float] = []
    for tick in range(round(end / step) + 1):
        found += [round(tick * step, 6)] * len(one.take_due(tick * step + 1e-9))
    return found


def test_packets_leave_at_the_rate_and_arrive_after_the_delay() -> None:
    one = lane(rate_bits=1e6, delay=0.02)
    assert all(one.accept(PACKET, 0.0) for _ in range(3))
    # 10 ms for each at 1 Mbit/s.
    assert arrivals(one) == [0.03, 0.04, 0.05]


def test_free_sender_does_not_save_up_time() -> None:
    one = lane(rate_bits=1e6)
    one.accept(PACKET, 0.0)
    one.accept(PACKET, 0.5)
    assert arrivals(one) == [0.01, 0.51]


def test_what_does_not_fit_into_the_queue_is_lost() -> None:
    one = lane(rate_bits=1e6, queue=0.03)
    assert [one.accept(PACKET, 0.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert one.dropped_packets == 2
    assert one.accept(PACKET, 0.02)
    assert len(arrivals(one)) == one.sent_packets == 5
    assert one.sent_bytes == 5 * len(PACKET)


def test_link_without_a_rate_only_delays() -> None:
    one = lane(delay=0.02)
    assert all(one.accept(PACKET, 0.0) for _ in range(1000))
    assert set(arrivals(one)) == {0.02}


def test_cut_link_loses_what_is_on_its_way_and_what_comes() -> None:
    one = lane(delay=0.02)
    one.accept(PACKET, 0.0)
    one.shape(rate_bits=None, delay_seconds=0.02, queue_seconds=0.1, cut=True)
    assert not one.accept(PACKET, 0.0)
    assert arrivals(one) == []
    assert one.dropped_packets == 2
    one.shape(rate_bits=None, delay_seconds=0.0, queue_seconds=0.1, cut=False)
    assert one.accept(PACKET, 0.0)
    assert len(arrivals(one)) == 1


def test_counters_are_those_of_the_device() -> None:
    found = parse_counters(NET_DEV, "wan0")
    assert found == Counters(350_000, 4000, 7_000_000, 9000)
    assert found - Counters(50_000, 1000, 1_000_000, 0) == Counters(300_000, 3000, 6_000_000, 9000)
    with pytest.raises(ValueError, match="no network device eth0"):
        parse_counters(NET_DEV, "eth0")


def test_ends_know_each_other() -> None:
    assert other_end("10.0.0.1") == "10.0.0.2"
    assert other_end(other_end("10.0.0.1")) == "10.0.0.1"
    with pytest.raises(ValueError, match="no end of a link"):
        other_end("10.0.0.3")

"""Addresses, the book of names, and the kernel's log, without a kernel."""

from __future__ import annotations

import ipaddress
import struct
import time

import pytest

from offload_builder.egress.firewall.addresses import project_addresses, uplink_addresses
from offload_builder.egress.firewall.namebook import NameBook
from offload_builder.egress.firewall.nflog import parse_ip, parse_messages
from offload_builder.egress.firewall.ruleset import Stage
from offload_builder.egress.policy.model import PortRange, Protocol
from offload_builder.egress.resolver.contract import Admission, Grant
from offload_core.errors import AccessDeniedError, ConfigError, QuotaExceededError


def admission(address: str, ports: PortRange | None, seconds: int = 60, **more) -> Admission:
    protocol = more.pop("protocol", Protocol.TCP)
    grant = Grant(protocol, ports)
    return Admission(ipaddress.ip_address(address), grant, more.pop("protected", False), seconds)


def test_projects_share_no_address():
    networks = [network for n in (0, 1, 2, 1023) for network in (project_addresses(n).v4,)]
    assert not any(a.overlaps(b) for i, a in enumerate(networks) for b in networks[:i])
    one = project_addresses(5)
    assert ipaddress.ip_address(one.daemon_v4) not in one.steps_v4
    assert ipaddress.ip_address(one.daemon_v6) not in one.steps_v6
    with pytest.raises(ConfigError, match="1024 projects"):
        project_addresses(1024)


def test_an_uplink_avoids_networks_that_the_machine_uses():
    first = uplink_addresses(7, [])
    second = uplink_addresses(7, [first.v4])
    assert not first.v4.overlaps(second.v4)
    with pytest.raises(ConfigError, match="no network"):
        uplink_addresses(7, [ipaddress.ip_network("198.18.0.0/15")])


def test_what_is_admitted_again_gets_the_later_end():
    now = [100.0]
    book = NameBook("p0", lambda: now[0])

    def admit(*some: Admission) -> str:
        plan = book.plan(some)
        book.commit(plan)
        return plan.text

    assert "timeout 60s" in admit(admission("203.0.113.1", PortRange(443, 443)))
    assert admit(admission("203.0.113.1", PortRange(443, 443), 10)) == ""
    now[0] += 30
    assert "timeout 50s" in admit(admission("203.0.113.1", PortRange(443, 443), 50))
    now[0] += 51
    assert len(book) == 0


def test_ranges_of_ports_that_overlap_become_one():
    book = NameBook("p0", lambda: 0.0)
    for ports in (PortRange(10, 20), PortRange(30, 40), PortRange(15, 35)):
        plan = book.plan([admission("203.0.113.1", ports)])
        book.commit(plan)
    assert "203.0.113.1 . tcp . 10-40" in plan.text
    assert len(book) == 1


def test_a_range_whose_time_is_over_makes_no_other_one_wider():
    now = [100.0]
    book = NameBook("p0", lambda: now[0])
    book.commit(book.plan([admission("203.0.113.1", PortRange(10, 20), 10)]))
    now[0] += 11
    text = book.plan([admission("203.0.113.1", PortRange(15, 35))]).text
    # The kernel may have it for a moment longer.
    assert "delete element inet offload_build p0_range4 { 203.0.113.1 . tcp . 10-20 }" in text
    assert text.endswith("203.0.113.1 . tcp . 15-35 timeout 60s }\n")


def test_an_answer_takes_no_longer_for_what_was_admitted_before():
    book = NameBook("p0", lambda: 0.0)
    grants = (PortRange(443, 443), PortRange(8000, 8100))
    some = [admission(f"203.0.{n // 250}.{n % 250}", one) for n in range(20_000) for one in grants]
    book.commit(book.plan(some))
    began = time.thread_time()
    for n in range(100):
        book.commit(book.plan([admission(f"198.51.100.{n}", one) for one in grants]))
    assert time.thread_time() - began < 0.3
    assert len(book) == 40_200


def test_a_protected_address_needs_a_word_of_the_policy():
    book = NameBook("p0")
    for address, protected in (("10.1.2.3", False), ("127.0.0.1", True), ("::1", True)):
        with pytest.raises(AccessDeniedError, match="protected"):
            book.plan([admission(address, None, protected=protected)])
    assert "p0_whole4" in book.plan([admission("10.1.2.3", None, protected=True)]).text
    assert "p0_all6" in book.plan([admission("2001:db8::1", None, protocol=Protocol.ANY)]).text


def test_too_many_addresses_are_refused(monkeypatch):
    monkeypatch.setattr("offload_builder.egress.firewall.namebook.NAMES_SIZE", 3)
    book = NameBook("p0")
    with pytest.raises(QuotaExceededError):
        book.plan([admission(f"203.0.113.{n}", PortRange(1, 1)) for n in range(4)])


def packet(protocol: int = 6, port: int = 443) -> bytes:
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, protocol, 0,
                       bytes([100, 64, 0, 2]), bytes([203, 0, 113, 10]))  # fmt: skip
    return head + struct.pack(">HH", 50000, port) + bytes(16)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(prefix: bytes, payload: bytes) -> bytes:
    body = bytes(4) + attribute(10, prefix + b"\0") + attribute(9, payload)
    return struct.pack("IHHII", 16 + len(body), 4 << 8, 0, 0, 0) + body


def test_the_log_of_the_kernel_is_understood():
    data = message(b"offload:3:denied:", packet()) + message(b"someone else:", packet())
    data += message(b"offload:4:allowed:", packet(1)) + message(b"offload:5:nonsense:", packet())
    first, second = parse_messages(data, 1.0)
    assert (first.slot, first.stage, first.port, first.protocol) == (
        3, Stage.DENIED, 443, Protocol.TCP
    )  # fmt: skip
    assert str(first.address) == "203.0.113.10"
    assert (second.slot, second.port, second.protocol) == (4, None, Protocol.ICMP)


def test_cut_messages_are_left_out():
    whole = message(b"offload:3:denied:", packet())
    for size in range(len(whole)):
        assert list(parse_messages(whole[:size], 1.0)) == []
    assert parse_ip(b"") is None
    assert parse_ip(packet()[:21]) is not None
    assert parse_ip(b"\x00" * 60) is None


def test_ports_behind_extension_headers_are_found():
    head = struct.pack(">IHBB16s16s", 0x60000000, 28, 60, 64, bytes(15) + b"\1", bytes(15) + b"\2")
    body = bytes([17, 0]) + bytes(6) + struct.pack(">HHHH", 1, 53, 8, 0)
    assert parse_ip(head + body) == (
        ipaddress.ip_address("::1"), ipaddress.ip_address("::2"), 53, Protocol.UDP
    )  # fmt: skip

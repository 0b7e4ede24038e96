"""What is read out of the first bytes of connections."""

from __future__ import annotations

import ipaddress
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.egress.firewall.firstbytes import MAX_HEAD_BYTES, NOTHING, Claim, read_claim
from offload_builder.egress.firewall.namecheck import MAX_AHEAD, MAX_AHEAD_BYTES, Beginning
from offload_builder.egress.firewall.tcppackets import Flow, Segment, make_packets, parse_segment

HEAD = b"Host: a.test:8080\r\nAccept: */*\r\n\r\nbody"


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


def with_extension(data: bytes, kind: int) -> bytes:
    """Add an empty extension to a hello in one record."""
    added = kind.to_bytes(2) + b"\0\0"
    body = data[9:]
    at = 34 + 1 + body[34]
    at += 2 + int.from_bytes(body[at : at + 2])
    at += 1 + body[at]
    size = int.from_bytes(body[at : at + 2]) + 4
    body = body[:at] + size.to_bytes(2) + body[at + 2 :] + added
    return data[:3] + (len(body) + 4).to_bytes(2) + b"\x01" + len(body).to_bytes(3) + body


def in_records(data: bytes, size: int) -> bytes:
    """Spread a hello in one record over records with so many bytes each."""
    body = data[5:]
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(data[:3] + len(one).to_bytes(2) + one for one in pieces)


@pytest.mark.parametrize(("data", "hosts"), [
    (in_records(hello("a.test"), 100), (("a.test", None),)),
    (hello("A.test"), (("a.test", None),)),
    (b"GET / HTTP/1.1\r\n" + HEAD, (("a.test", None),)),
    (b"\r\nget /x HTTP/1.0\nHost:a.test.\n\n", (("a.test", None),)),
    (b"GET http://b.test/x HTTP/1.1\r\n" + HEAD, (("a.test", None), ("b.test", None))),
    (b"GET http://u@b.test:81?x HTTP/1.1\r\n" + HEAD, (("a.test", None), ("b.test", None))),
    (b"CONNECT b.test:443 HTTP/1.1\r\n" + HEAD, (("b.test", 443),)),
    (b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\n" + HEAD, (("2001:db8::1", 443),)),
    (b"FOO / HTTP/1.1\r\n" + HEAD, (("a.test", None),)),
    (b"GET\t/\x0bHTTP/1.1\r\n" + HEAD, (("a.test", None),)),
    (b" GET / HTTP/1.1\r\n" + HEAD, (("a.test", None),)),
    (b"GET /?to=http://b.test/ HTTP/1.1\r\n" + HEAD, (("a.test", None),)),
])  # fmt: skip
def test_the_name_is_read(data, hosts):
    assert read_claim(data) == Claim(hosts)


@pytest.mark.parametrize(("data", "why"), [
    (hello(None), "does not say which name"),
    (with_extension(hello("a.test"), 0xFE0D), "ECH"),
    (b"\x16\x03\x01\x00\x05\x02\0\0\0\0", "wrongly"),
    (b"\x16\x05garbage", "wrongly"),
    (b"GET / HTTP/1.1\r\nAccept: x\r\n\r\n", "which host"),
    (b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n", "more than one"),
    (b"GET / HTTP/1.1\r\nHost: a.test\r\n b.test\r\n\r\n", "a line that is none"),
    (b"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n", "a line that is none"),
    (b"GET / HTTP/1.1\r\nHost: a.test/b\r\n\r\n", "a host that is none"),
    (b"GET / HTTP/1.1\r\nHost: a.test\x1b[2J\r\n\r\n", "a line that is none"),
    (b"GET / HTTP/1.1\r\nHost: a.test\x9b2J\r\n\r\n", "a host that is none"),
    (b"GET / HTTP/1.1\r\nHost: a.test\r\nX: y\rHost: b.test\r\n\r\n", "a line that is none"),
    (b"CONNECT b.test:99999 HTTP/1.1\r\n" + HEAD, "a host that is none"),
    (b"GET /\r\n", "which host"),
    (b"\x15\x03\x01\x00\x02\x01\x5a" + hello("a.test"), "does not begin with a hello"),
    (b"\x14\x03\x03\x00\x01\x01" + hello("a.test"), "does not begin with a hello"),
    (b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10", "which name"),
    (hello("a.test").replace(b"a.test", b"b\0test"), "a name that is none"),
    (hello("a.test").replace(b"a.test", b"b#test"), "a name that is none"),
    (in_records(hello("a.test"), 1), "too many pieces"),
    (b"GET / HTTP/1.1\r\nHost: b.test#.a.test\r\n\r\n", "a host that is none"),
    (b"GET http://b.test#@a.test/ HTTP/1.1\r\n" + HEAD, "a host that is none"),
    (b"GET http://a.test\\@b.test/ HTTP/1.1\r\n" + HEAD, "a host that is none"),
    (b"GET / HTTP/1.1\r\nX: y\rHost: b.test\r\n" + HEAD, "a line that is none"),
    (b"GET / HTTP/1.1\rHost: b.test\r\n" + HEAD, "a line that is none"),
    (b"GET / HTTP/1.1 x\r\n" + HEAD, "a line that is none"),
    (b"\tGET\t/\r\n", "which host"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2 without TLS"),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES, "too long"),
])  # fmt: skip
def test_what_hides_its_name_is_refused(data, why):
    found = read_claim(data)
    assert found is not None
    assert why in found.refused


@pytest.mark.parametrize("data", [
    b"SSH-2.0-OpenSSH_9.2\r\n", b"003egit-upload-pack /x\0host=a\0", b"\x05\x01\x00",
    b"EHLO me\r\n", b"*1\r\n$4\r\nPING\r\n", b"\xff\xfb\x1f", b"\x80\x0b\0\0",
    b"\x15\x01", b"\0\0\0\x08\x04\xd2\x16\x2f",
])  # fmt: skip
def test_other_protocols_have_no_name(data):
    assert read_claim(data) is NOTHING


@pytest.mark.parametrize("data", [
    hello("a.test"),
    b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    b" \tM-SEARCH /\xe4 HTTP/1.1\r\nHost: a.test\r\n\r\n",
    b"PROPPATCH /" + b"x" * (MAX_HEAD_BYTES + 100),
])  # fmt: skip
def test_nothing_is_said_before_there_is_enough(data):
    assert all(read_claim(data[:size]) is None for size in range(len(data)))


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x16\x03\x01", b"GET ", b"GET / HTTP/1.1\r\n"])
)
def test_no_bytes_raise(data, start):
    read_claim(start + data)


@pytest.mark.parametrize(
    ("source", "target"), [("100.64.0.2", "203.0.113.1"), ("fd00::2", "2001:db8::1")]
)
def test_segments_are_made_as_they_were(source, target):
    flow = Flow(ipaddress.ip_address(source), 4000, ipaddress.ip_address(target), 443)
    head = bytes.fromhex("0fa001bbffffffff00000001") + b"\x80\x18\xff\xff\0\0\0\0" + b"\x01" * 12
    data = bytes(range(256)) * 8
    segment = Segment(flow, 0xFFFFFFFF, head[13], head, data)
    packets = list(make_packets(segment, 0xFFFFFFFF, data, 1400))
    parsed = [found for packet in packets if (found := parse_segment(packet)) is not None]
    assert len(parsed) == len(packets) == 2
    assert b"".join(one.data for one in parsed) == data
    assert all(
        one.flow == flow and len(packet) <= 1400
        for one, packet in zip(parsed, packets, strict=True)
    )
    assert [one.sequence for one in parsed] == [0xFFFFFFFF, len(parsed[0].data) - 1]
    assert [one.flags & 8 for one in parsed] == [0, 8]


def a_segment(sequence: int, data: bytes, flags: int = 0x18, urgent: int = 0) -> Segment:
    flow = Flow(ipaddress.ip_address("100.64.0.2"), 4000, ipaddress.ip_address("203.0.113.1"), 443)
    head = bytes.fromhex("0fa001bbffffffff00000001") + bytes((0x50, flags)) + b"\xff\xff\0\0"
    return Segment(flow, sequence, flags, head + urgent.to_bytes(2), data)


def test_only_the_last_packet_ends_a_connection_and_none_is_urgent():
    segment = a_segment(1, b"x" * 3000, flags=0x39, urgent=7)
    made = list(make_packets(segment, 1, segment.data, 1400))
    parsed = [found for packet in made if (found := parse_segment(packet)) is not None]
    assert [one.flags for one in parsed] == [0x10, 0x10, 0x19]
    assert all(one.head[18:20] == b"\0\0" for one in parsed)


def test_bytes_that_came_once_stay_whatever_comes_in_their_place():
    beginning = Beginning(0xFFFFFFFE)
    assert not beginning.take(a_segment(3, b"fgh"))
    assert not beginning.take(a_segment(0xFFFFFFFE, b"abc"))
    assert beginning.data == b"abc"
    assert beginning.take(a_segment(0xFFFFFFFE, b"XX"))
    assert not beginning.take(a_segment(0, b"Xde"))
    assert beginning.data == b"abcdefgh"
    assert beginning.take(a_segment(0xFFFFFFFE, b"X" * 8))


def test_bytes_of_one_connection_that_wait_for_others_are_bounded():
    beginning = Beginning(0)
    for offset in range(1, 1000):
        beginning.take(a_segment(offset, b"x" * (1000 if offset % 2 else 1)))
    assert len(beginning._ahead) == MAX_AHEAD
    beginning.take(a_segment(1, b"x" * MAX_AHEAD_BYTES))
    assert sum(map(len, beginning._ahead.values())) <= MAX_AHEAD_BYTES
    beginning.take(a_segment(0, b"a"))
    assert not beginning._ahead
    assert beginning._ahead_bytes == 0


@given(st.binary(max_size=120))
def test_no_packet_raises(data):
    for start in (b"", b"\x45\0\0\x30" + b"\0" * 5 + b"\x06", b"\x60\0\0\0\0\x20\x06\x40"):
        parse_segment(start + data)

"""TCP segments of a project as the kernel logged them, and new ones with the same bytes."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload_builder.egress.policy.model import Address

_TCP = 6
_V4_HEAD, _V6_HEAD = 20, 40
SYN = 2
_FINISH, _PUSH, _URGENT = 1, 8, 32
_ACKNOWLEDGE = 16
_AT_END = _FINISH | _PUSH
SEQUENCES = 1 << 32


@dataclass(frozen=True, slots=True)
class Flow:
    """The project's side of a connection first."""

    source: Address
    source_port: int
    address: Address
    port: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP segment.

    Attributes:
        flow: its connection.
        sequence: of its first byte.
        flags: of TCP.
        head: of TCP with its options; ports, acknowledgement and window are used again.
        data: what it carries.
    """

    flow: Flow
    sequence: int
    flags: int
    head: bytes
    data: bytes


def parse_segment(packet: bytes) -> Segment | None:
    """Return the segment of an IP packet; None for another protocol, or when it is cut short."""
    source: Address
    target: Address
    if len(packet) >= _V4_HEAD and packet[0] >> 4 == 4 and packet[9] == _TCP:
        start, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4])
        source, target = ipaddress.IPv4Address(packet[12:16]), ipaddress.IPv4Address(packet[16:20])
    elif len(packet) >= _V6_HEAD and packet[0] >> 4 == 6 and packet[6] == _TCP:
        start, end = _V6_HEAD, _V6_HEAD + int.from_bytes(packet[4:6])
        source, target = ipaddress.IPv6Address(packet[8:24]), ipaddress.IPv6Address(packet[24:40])
    else:
        return None
    if len(packet) < end or end < start + 20:
        return None
    size = (packet[start + 12] >> 4) * 4
    if size < 20 or start + size > end:
        return None
    head = packet[start : start + size]
    source_port, port, sequence = struct.unpack_from("!HHI", head)
    flow = Flow(source, source_port, target, port)
    return Segment(flow, sequence, head[13], head, packet[start + size : end])


def make_packets(last: Segment, sequence: int, data: bytes, mtu: int) -> Iterator[bytes]:
    """Yield IP packets that carry bytes as the sender of a segment would have.

    None of them is urgent: servers take a byte that is out of what they read, so they would read
    something else than was looked at.

    Args:
        last: the newest segment of the connection.
        sequence: of the first byte.
        data: all bytes.
        mtu: of the way out, in bytes.
    """
    v4 = last.flow.address.version == 4
    room = mtu - len(last.head) - (_V4_HEAD if v4 else _V6_HEAD)
    for start in range(0, len(data), room):
        part = data[start : start + room]
        head = bytearray(last.head)
        struct.pack_into("!I", head, 4, (sequence + start) % SEQUENCES)
        ends = start + room >= len(data)
        head[13] = (last.flags & ~_URGENT | _PUSH) if ends else last.flags & ~(_AT_END | _URGENT)
        head[16:20] = bytes(4)
        addresses = last.flow.source.packed + last.flow.address.packed
        pseudo = addresses + struct.pack("!II", len(head) + len(part), _TCP)
        struct.pack_into("!H", head, 16, _checksum(pseudo + bytes(head) + part))
        yield _packet(addresses, bytes(head) + part)


def make_acknowledgement(last: Segment, next_sequence: int) -> bytes:
    """Return an IP packet by which the other side would say that it has bytes.

    Args:
        last: the newest segment of the connection.
        next_sequence: of the byte after those.
    """
    flow = last.flow
    (answered,) = struct.unpack_from("!I", last.head, 8)
    head = struct.pack(
        "!HHIIBBHHH", flow.port, flow.source_port, answered, next_sequence % SEQUENCES,
        0x50, _ACKNOWLEDGE, 0xFFFF, 0, 0,
    )  # fmt: skip
    addresses = flow.address.packed + flow.source.packed
    value = _checksum(addresses + struct.pack("!II", len(head), _TCP) + head)
    return _packet(addresses, head[:16] + struct.pack("!H", value) + head[18:])


def _packet(addresses: bytes, body: bytes) -> bytes:
    if len(addresses) == 8:
        # The kernel fills in the checksum of this header.
        fixed = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, _TCP, 0)
    else:
        fixed = struct.pack("!IHBB", 6 << 28, len(body), _TCP, 64)
    return fixed + addresses + body


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF

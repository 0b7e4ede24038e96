"""New connections as the kernel logs them (NFLOG), read from a netlink socket.

Sources: linux/netfilter/nfnetlink_log.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.egress.firewall.ruleset import LOG_GROUP, LOG_PREFIX, Stage
from offload_builder.egress.policy.model import Protocol
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from offload_builder.egress.firewall.namespaces import NetworkNamespace
    from offload_builder.egress.policy.model import Address

_log = structlog.get_logger(__name__)

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 4 << 8
_MSG_PACKET, _MSG_CONFIG = _SUBSYSTEM | 0, _SUBSYSTEM | 1
_NLM_REQUEST_ACK = 0x1 | 0x4
_NLMSG_ERROR = 2
_CFG_CMD, _CFG_MODE, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 4, 5
_CMD_BIND = 1
_COPY_PACKET = 2
_ATTR_PAYLOAD, _ATTR_PREFIX = 9, 10
_COPY_BYTES = 128
_TIMEOUT_CENTISECONDS = 1
"""A step that was refused may end at once; who tells which step it was must not be late."""
_BATCH = 50
_RECEIVE_BYTES = 1 << 20
_READS_PER_TURN = 16
_PROTOCOLS = {6: Protocol.TCP, 17: Protocol.UDP, 1: Protocol.ICMP, 58: Protocol.ICMP}
_PORTED = (6, 17, 33, 132, 136)
_EXTENSIONS = (0, 43, 60)


@dataclass(frozen=True, slots=True)
class Logged:
    """A new connection of a project, or a packet without one, and what decided about it.

    Attributes:
        time: seconds since 1970.
        slot: of the project at its router.
        stage: what decided.
        source: the step, or the project's BuildKit.
        address: where to.
        port: None for protocols without ports.
        protocol: `ANY` for one that policies do not name.
    """

    time: float
    slot: int
    stage: Stage
    source: Address
    address: Address
    port: int | None
    protocol: Protocol


class ConnectionLog:
    """Hears of new connections in a namespace; an async context manager.

    Only one at a time can listen in a namespace. Without one the kernel drops what it would tell;
    nothing else changes.

    Args:
        namespace: the router's.
        listener: called in the event loop for each; it must not take long.
    """

    def __init__(self, namespace: NetworkNamespace, listener: Callable[[Logged], None]) -> None:
        self._namespace = namespace
        self._listener = listener
        self._socket: socket.socket | None = None
        self.lost = 0
        """How often the kernel had to drop some because they were not read in time."""

    async def __aenter__(self) -> Self:
        """Begin to listen.

        Raises:
            ConfigError: the kernel does not let us.
        """
        self._socket = await self._namespace.run(open_log, LOG_GROUP)
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _read(self) -> None:
        if self._socket is None:
            return
        # A flood must not keep the loop from everything else.
        for _ in range(_READS_PER_TURN):
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self.lost += 1
                    continue
                raise
            now = time.time()
            for logged in parse_messages(data, now):
                self._listener(logged)


def open_log(group: int, copy_bytes: int = _COPY_BYTES, batch: int = _BATCH) -> socket.socket:
    """Return a socket on which the kernel tells what rules log to a group.

    Args:
        group: of the rules, in the namespace that the thread is in.
        copy_bytes: of each packet.
        batch: packets that may wait for each other, for `_TIMEOUT_CENTISECONDS` at most.

    Raises:
        ConfigError: the kernel does not let us.
    """
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    try:
        made.bind((0, 0))
        with contextlib.suppress(OSError):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        for kind, value in (
            (_CFG_CMD, struct.pack("B", _CMD_BIND)),
            (_CFG_MODE, struct.pack(">IBx", copy_bytes, _COPY_PACKET)),
            (_CFG_TIMEOUT, struct.pack(">I", _TIMEOUT_CENTISECONDS)),
            (_CFG_QTHRESH, struct.pack(">I", batch)),
        ):
            _configure(made, group, kind, value)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"the log of connections cannot be read: {error.strerror}",
            hint="the kernel needs nfnetlink_log",
        ) from error
    return made


def _configure(made: socket.socket, group: int, kind: int, value: bytes) -> None:
    length = 4 + len(value)
    attribute = struct.pack("HH", length, kind) + value + b"\0" * (-length % 4)
    body = struct.pack(">BBH", socket.AF_UNSPEC, 0, group) + attribute
    header = struct.pack("IHHII", 16 + len(body), _MSG_CONFIG, _NLM_REQUEST_ACK, 0, 0)
    made.settimeout(5.0)
    made.send(header + body)
    while True:
        answer = made.recv(65_536)
        size, message = struct.unpack_from("IH", answer)
        if message == _NLMSG_ERROR:
            (code,) = struct.unpack_from("i", answer, 16)
            if code:
                raise OSError(-code, "the kernel refused the log group")
            return
        if size < 16:
            raise OSError(errno.EPROTO, "the kernel's answer is too short")


def parse_messages(data: bytes, now: float) -> Iterator[Logged]:
    """Return what a datagram of the kernel says; what is none of ours is left out."""
    for slot, word, payload in read_packets(data):
        found = parse_ip(payload)
        if found is None:
            continue
        with contextlib.suppress(ValueError):
            yield Logged(now, slot, Stage(word), *found)


def read_packets(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Yield the packets in a datagram of the kernel: slot and word of the prefix, the packet."""
    offset = 0
    while offset + 16 <= len(data):
        size, message = struct.unpack_from("IH", data, offset)
        if size < 16 or offset + size > len(data):
            return
        if message == _MSG_PACKET:
            prefix, payload = _attributes(memoryview(data)[offset + 20 : offset + size])
            words = prefix.decode("ascii", "replace").split(":")
            if len(words) >= 3 and words[0] == LOG_PREFIX and words[1].isdigit():
                yield int(words[1]), words[2], payload
        offset += (size + 3) & ~3


def _attributes(body: memoryview) -> tuple[bytes, bytes]:
    prefix, payload, offset = b"", b"", 0
    while offset + 4 <= len(body):
        size, kind = struct.unpack_from("HH", body, offset)
        if size < 4:
            break
        value = bytes(body[offset + 4 : offset + size])
        if kind == _ATTR_PREFIX:
            prefix = value.rstrip(b"\0")
        elif kind == _ATTR_PAYLOAD:
            payload = value
        offset += (size + 3) & ~3
    return prefix, payload


def parse_ip(packet: bytes) -> tuple[Address, Address, int | None, Protocol] | None:
    """Return source, destination, port and protocol of an IP packet; None when it is cut short."""
    if len(packet) < 20:
        return None
    source: Address
    target: Address
    if packet[0] >> 4 == 4:
        number, rest = packet[9], packet[(packet[0] & 15) * 4 :]
        source, target = ipaddress.IPv4Address(packet[12:16]), ipaddress.IPv4Address(packet[16:20])
    elif packet[0] >> 4 == 6 and len(packet) >= 40:
        number, rest = packet[6], packet[40:]
        source, target = ipaddress.IPv6Address(packet[8:24]), ipaddress.IPv6Address(packet[24:40])
        while number in _EXTENSIONS and len(rest) >= 8:
            number, rest = rest[0], rest[(rest[1] + 1) * 8 :]
    else:
        return None
    port = int.from_bytes(rest[2:4]) if number in _PORTED and len(rest) >= 4 else None
    return source, target, port, _PROTOCOLS.get(number, Protocol.ANY)

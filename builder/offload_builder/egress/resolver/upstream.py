"""Asking DNS servers: UDP first, TCP where an answer is long or doubtful.

A forged answer has to guess the port, which the kernel draws for each query, the identifier, and
the spelling of the name, whose letters are drawn upper or lower case and come back as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import structlog

if TYPE_CHECKING:
    from offload_builder.egress.resolver.metrics import ResolverMetrics
    from offload_builder.egress.resolver.upstreams import Server, Upstreams

_log = structlog.get_logger(__name__)

_EDNS_BYTES = 1232
_MAX_BYTES = 65535
_GOOD = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)


class NoAnswerError(Exception):
    """No server of the node has answered a question about a name."""


class _OddAnswerError(Exception):
    """An answer that is none to the question; the same question by TCP settles it."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        attempt: for one server by UDP.
        tcp: for one server by TCP.
        total: for one name.
        rounds: how often each server is asked.
    """

    attempt: float = 1.2
    tcp: float = 2.5
    total: float = 4.5
    rounds: int = 2


class Asker:
    """Asks the servers of a node; keeps no socket between questions."""

    def __init__(
        self, upstreams: Upstreams, metrics: ResolverMetrics, patience: Patience | None = None
    ) -> None:
        self._upstreams = upstreams
        self._metrics = metrics
        self._patience = patience or Patience()

    async def ask(self, name: dns.name.Name, qtype: dns.rdatatype.RdataType) -> dns.message.Message:
        """Return the first good answer of the servers.

        Raises:
            NoAnswerError: there was none in time.
        """
        servers = self._upstreams.servers()
        if not servers:
            raise NoAnswerError("the node knows no DNS server; name one in its configuration")
        reason = "no answer in time"
        try:
            async with asyncio.timeout(self._patience.total):
                for _ in range(self._patience.rounds):
                    for server in servers:
                        try:
                            return await self._ask_one(server, name, qtype)
                        except (OSError, TimeoutError, _OddAnswerError) as error:
                            reason = f"{server}: {str(error) or 'no answer in time'}"
                            self._metrics.upstream_failures.inc()
        except TimeoutError:
            pass
        _log.warning("dns.upstream.failed", name=name.to_text()[:100], reason=reason)
        raise NoAnswerError(f"no DNS server of the node has answered ({reason})")

    async def _ask_one(
        self, server: Server, name: dns.name.Name, qtype: dns.rdatatype.RdataType
    ) -> dns.message.Message:
        query = dns.message.make_query(
            _mixed_case(name), qtype, use_edns=0, payload=_EDNS_BYTES, id=secrets.randbits(16)
        )
        try:
            async with asyncio.timeout(self._patience.attempt):
                answer = await _by_udp(server, query)
        except _OddAnswerError:
            answer = None
        if answer is None or answer.flags & dns.flags.TC:
            answer = await self._by_tcp(server, query)
        if answer.rcode() == dns.rcode.FORMERR:
            # A server from before EDNS (RFC 6891, 6.2.2).
            query.use_edns(edns=-1)
            answer = await self._by_tcp(server, query)
        if answer.rcode() not in _GOOD:
            raise _OddAnswerError(f"answers {dns.rcode.to_text(answer.rcode())}")
        return answer

    async def _by_tcp(self, server: Server, query: dns.message.Message) -> dns.message.Message:
        async with asyncio.timeout(self._patience.tcp):
            return await _by_tcp(server, query)


async def _by_udp(server: Server, query: dns.message.Message) -> dns.message.Message:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        # Connected: the kernel draws the port, drops what others send, and tells of ICMP errors.
        sock.connect((server.address, server.port))
        sock.send(query.to_wire())
        while True:
            wire = await loop.sock_recv(sock, _MAX_BYTES)
            if wire[:2] == struct.pack("!H", query.id):
                return _read(wire, query, spelled=True)


async def _by_tcp(server: Server, query: dns.message.Message) -> dns.message.Message:
    reader, writer = await asyncio.open_connection(server.address, server.port)
    try:
        wire = query.to_wire()
        writer.write(struct.pack("!H", len(wire)) + wire)
        await writer.drain()
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        answer = await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise _OddAnswerError("closed the connection early") from error
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return _read(answer, query, spelled=False)


def _read(wire: bytes, query: dns.message.Message, *, spelled: bool) -> dns.message.Message:
    try:
        answer = dns.message.from_wire(wire, ignore_trailing=True)
    except dns.message.Truncated as error:
        answer = error.message()
    except (dns.exception.DNSException, ValueError, IndexError) as error:
        raise _OddAnswerError("sent something that is no DNS message") from error
    if answer.id != query.id or not answer.flags & dns.flags.QR:
        raise _OddAnswerError("answered another question")
    if not answer.question and answer.rcode() not in _GOOD:
        return answer
    if len(answer.question) != 1:
        raise _OddAnswerError("answered without the question")
    asked, told = query.question[0], answer.question[0]
    same = asked.rdtype == told.rdtype and told.rdclass == dns.rdataclass.IN
    if not same or asked.name != told.name:
        raise _OddAnswerError("answered another question")
    if spelled and asked.name.labels != told.name.labels:
        raise _OddAnswerError("changed the spelling of the name")
    return answer


def _mixed_case(name: dns.name.Name) -> dns.name.Name:
    """Draw the case of each letter (draft-vixie-dnsext-dns0x20)."""
    labels = []
    for label in name.labels:
        coins = secrets.randbits(8 * len(label) + 1)
        labels.append(
            bytes(
                byte ^ 0x20
                if coins >> place & 1 and (65 <= byte <= 90 or 97 <= byte <= 122)
                else byte
                for place, byte in enumerate(label)
            )
        )
    return dns.name.Name(labels)

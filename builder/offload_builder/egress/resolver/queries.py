"""The bytes of a query, and the bytes of its answer (RFC 1035, 6891, 8914)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER_BYTES = 12
PLAIN_UDP_BYTES = 512
MAX_UDP_BYTES = 1232
"""Fits into one packet nearly everywhere, so that answers are not split (DNS Flag Day 2020)."""
MAX_TCP_BYTES = 65535
_RESPONSE_BIT = 0x80
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class UnanswerableError(Exception):
    """Bytes that get no answer: no query at all, or an answer themselves."""


class RefusedQueryError(Exception):
    """A query that is answered with an error.

    Attributes:
        answer: the bytes of that answer.
        rcode: the error.
    """

    def __init__(self, answer: bytes, rcode: dns.rcode.Rcode) -> None:
        super().__init__(dns.rcode.to_text(rcode))
        self.answer = answer
        self.rcode = rcode


@dataclass(frozen=True, slots=True)
class Query:
    """One question of a client.

    Attributes:
        name: lower case, without a dot at its end; the root is empty.
        qtype: wanted.
        udp_bytes: the longest answer that it takes by UDP.
        extended: it understands EDNS.
        message: the query itself.
    """

    name: str
    qtype: dns.rdatatype.RdataType
    udp_bytes: int
    extended: bool
    message: dns.message.Message

    @property
    def type_name(self) -> str:
        """The wanted type as people write it."""
        return dns.rdatatype.to_text(self.qtype)

    @property
    def is_host_name(self) -> bool:
        """Whether the name has only letters, digits, dashes, underscores and dots."""
        return len(self.name) <= 253 and _NAME.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class Extra:
    """Why an answer is as it is, for clients that understand EDNS (RFC 8914).

    Attributes:
        code: of the registry of extended errors.
        text: one sentence.
    """

    code: dns.edns.EDECode
    text: str


def read_query(wire: bytes) -> Query:
    """Read what a client has sent.

    Raises:
        UnanswerableError: it deserves no answer.
        RefusedQueryError: it is answered at once.
    """
    if len(wire) < HEADER_BYTES or wire[2] & _RESPONSE_BIT:
        raise UnanswerableError
    opcode = (wire[2] >> 3) & 0xF
    if opcode != dns.opcode.QUERY:
        raise _error(wire, dns.rcode.NOTIMP)
    try:
        message = dns.message.from_wire(wire, ignore_trailing=False)
    except (dns.exception.DNSException, ValueError, IndexError) as error:
        raise _error(wire, dns.rcode.FORMERR) from error
    if len(message.question) != 1 or message.answer or message.authority:
        raise _error(wire, dns.rcode.FORMERR)
    question = message.question[0]
    if message.edns > 0:
        raise RefusedQueryError(_plain(message, dns.rcode.BADVERS), dns.rcode.BADVERS)
    if question.rdclass != dns.rdataclass.IN:
        raise RefusedQueryError(_plain(message, dns.rcode.REFUSED), dns.rcode.REFUSED)
    extended = message.edns == 0
    size = max(PLAIN_UDP_BYTES, min(message.payload, MAX_UDP_BYTES)) if extended else 0
    return Query(
        name=question.name.to_text(omit_final_dot=True).lower()
        if question.name.labels[:-1]
        else "",
        qtype=question.rdtype,
        udp_bytes=size or PLAIN_UDP_BYTES,
        extended=extended,
        message=message,
    )


def write_answer(
    query: Query,
    rcode: dns.rcode.Rcode,
    records: Sequence[dns.rrset.RRset] = (),
    *,
    limit: int,
    extra: Extra | None = None,
) -> bytes:
    """Return the bytes of an answer; one that is longer than `limit` has no records, and says so.

    Args:
        query: what was asked; its spelling of the name is kept.
        rcode: success or error.
        records: answer.
        limit: bytes.
        extra: why.
    """
    response = _response(query.message, rcode, extra)
    response.answer.extend(records)
    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        # The client comes again by TCP (RFC 7766); a part of an answer helps nobody.
        short = _response(query.message, rcode, None)
        short.flags |= dns.flags.TC
        return short.to_wire(max_size=max(limit, PLAIN_UDP_BYTES))


def _response(
    query: dns.message.Message, rcode: dns.rcode.Rcode, extra: Extra | None
) -> dns.message.Message:
    response = dns.message.QueryMessage(id=query.id)
    response.flags = dns.flags.QR | dns.flags.RA | (query.flags & (dns.flags.RD | dns.flags.CD))
    response.question = list(query.question)
    if query.edns >= 0:
        options: list[dns.edns.Option] = []
        if extra is not None:
            options.append(dns.edns.EDEOption(extra.code, extra.text))
        response.use_edns(0, 0, MAX_UDP_BYTES, options=options)
    response.set_rcode(rcode)
    return response


def _plain(query: dns.message.Message, rcode: dns.rcode.Rcode) -> bytes:
    return _response(query, rcode, None).to_wire(max_size=PLAIN_UDP_BYTES)


def _error(wire: bytes, rcode: dns.rcode.Rcode) -> RefusedQueryError:
    """Return the answer to bytes of which only the header is understood."""
    flags = bytes([_RESPONSE_BIT | (wire[2] & 0x79), 0x80 | int(rcode)])
    return RefusedQueryError(wire[:2] + flags + bytes(8), rcode)

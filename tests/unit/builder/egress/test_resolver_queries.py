from __future__ import annotations

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_builder.egress.resolver.queries import (
    Extra,
    RefusedQueryError,
    UnanswerableError,
    read_query,
    write_answer,
)


def query_bytes(name: str = "a.example", kind: str = "A", **options: object) -> bytes:
    return dns.message.make_query(name, kind, **options).to_wire()  # type: ignore[arg-type]


@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_refused(wire: bytes) -> None:
    try:
        query = read_query(wire)
    except UnanswerableError:
        return
    except RefusedQueryError as error:
        assert error.answer[:2] == wire[:2]
        assert dns.message.from_wire(error.answer, question_only=True).flags & dns.flags.QR
        return
    assert write_answer(query, dns.rcode.NOERROR, limit=512)


@given(st.integers(0, 60), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_damaged_query_is_read_or_refused(place: int, noise: bytes, cut: bool) -> None:
    good = query_bytes(use_edns=0)
    place %= len(good)
    wire = good[:place] + noise + (b"" if cut else good[place + len(noise) :])
    try:
        query = read_query(wire)
    except (UnanswerableError, RefusedQueryError):
        return
    assert dns.message.from_wire(write_answer(query, dns.rcode.REFUSED, limit=512))


def test_a_name_that_points_at_itself_is_a_format_error() -> None:
    wire = query_bytes()[:12] + b"\xc0\x0c\x00\x01\x00\x01"
    with pytest.raises(RefusedQueryError) as refused:
        read_query(wire)
    assert refused.value.rcode == dns.rcode.FORMERR


def test_an_answer_gets_no_answer() -> None:
    wire = bytearray(query_bytes())
    wire[2] |= 0x80
    with pytest.raises(UnanswerableError):
        read_query(bytes(wire))


@pytest.mark.parametrize("opcode", [1, 2, 4, 5, 6, 15])
def test_other_operations_are_not_implemented(opcode: int) -> None:
    wire = bytearray(query_bytes())
    wire[2] = (wire[2] & 0x87) | opcode << 3
    with pytest.raises(RefusedQueryError) as refused:
        read_query(bytes(wire))
    assert refused.value.rcode == dns.rcode.NOTIMP


def test_two_questions_are_a_format_error() -> None:
    message = dns.message.make_query("a.example", "A")
    message.question.append(message.question[0])
    with pytest.raises(RefusedQueryError) as refused:
        read_query(message.to_wire())
    assert refused.value.rcode == dns.rcode.FORMERR


def test_a_class_beside_the_internet_is_refused() -> None:
    with pytest.raises(RefusedQueryError) as refused:
        read_query(query_bytes("version.bind", "TXT", rdclass="CH"))
    assert refused.value.rcode == dns.rcode.REFUSED


def test_an_unknown_version_of_edns_is_named() -> None:
    message = dns.message.make_query("a.example", "A", use_edns=0)
    message.ednsflags |= 1 << 16
    with pytest.raises(RefusedQueryError) as refused:
        read_query(message.to_wire())
    assert refused.value.rcode == dns.rcode.BADVERS


def test_names_of_65_labels_and_of_full_length_are_read() -> None:
    many = ".".join(["a"] * 65)
    longest = ".".join(["b" * 63, "c" * 63, "d" * 63, "e" * 61])
    assert read_query(query_bytes(many)).name == many
    query = read_query(query_bytes(longest))
    assert query.name == longest
    assert query.is_host_name


def test_a_name_with_other_letters_is_no_host_name() -> None:
    for name in (r"a\000b.example", r"a\032b.example", "b\\.c.example", "*.example"):
        assert not read_query(query_bytes(name)).is_host_name
    assert not read_query(query_bytes(".")).is_host_name


def test_the_spelling_of_the_question_comes_back() -> None:
    query = read_query(query_bytes("WwW.eXample"))
    assert query.name == "www.example"
    answer = dns.message.from_wire(write_answer(query, dns.rcode.NOERROR, limit=512))
    assert answer.question[0].name.to_text() == "WwW.eXample."


@pytest.mark.parametrize(("payload", "limit"), [(None, 512), (600, 600), (4096, 1232), (20, 512)])
def test_the_length_of_an_answer_is_what_the_client_takes(payload: int | None, limit: int) -> None:
    options = {} if payload is None else {"use_edns": 0, "payload": payload}
    query = read_query(query_bytes(**options))
    assert query.udp_bytes == limit
    texts = [f"203.0.113.{number}" for number in range(120)]
    records = [dns.rrset.from_text("a.example.", 60, "IN", "A", *texts)]
    wire = write_answer(query, dns.rcode.NOERROR, records, limit=query.udp_bytes)
    assert len(wire) <= limit
    answer = dns.message.from_wire(wire, raise_on_truncation=False)
    assert answer.flags & dns.flags.TC
    assert not answer.answer
    assert len(write_answer(query, dns.rcode.NOERROR, records, limit=65535)) > 1232


def test_the_reason_goes_to_clients_with_edns_only() -> None:
    extra = Extra(dns.edns.EDECode.BLOCKED, "no rule allows it")
    told = read_query(query_bytes(use_edns=0))
    answer = dns.message.from_wire(write_answer(told, dns.rcode.REFUSED, limit=512, extra=extra))
    assert [option.to_text() for option in answer.options] == [
        "EDE 15 (Blocked): no rule allows it"
    ]
    plain = read_query(query_bytes())
    answer = dns.message.from_wire(write_answer(plain, dns.rcode.REFUSED, limit=512, extra=extra))
    assert answer.edns < 0

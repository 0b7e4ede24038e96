"""Reading server names out of what strangers send."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload_builder.clienthello import (
    MAX_HELLO_BYTES,
    ClientHello,
    NotClientHelloError,
    alert,
    parse_client_hello,
)


def real_hello(name: str | None) -> bytes:
    """Return what OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def in_records(hello: bytes, size: int) -> bytes:
    """Return a hello with its handshake message cut into records of `size` bytes."""
    message = hello[5:]
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


HELLO = real_hello("node-1.node.offload")


def test_name_of_a_real_hello_is_found():
    assert parse_client_hello(HELLO) == ClientHello("node-1.node.offload")


def test_name_is_lower_cased():
    assert parse_client_hello(real_hello("Gateway.OFFLOAD")) == ClientHello("gateway.offload")


def test_hello_without_a_name_has_an_empty_one():
    assert parse_client_hello(real_hello(None)) == ClientHello("")


def test_bytes_behind_the_hello_do_not_matter():
    assert parse_client_hello(HELLO + b"\x14\x03\x03\x00\x01\x01") == ClientHello(
        "node-1.node.offload"
    )


@pytest.mark.parametrize("size", [1, 3, 4, 5, 100])
def test_hello_in_many_records_is_put_together(size):
    assert parse_client_hello(in_records(HELLO, size)) == ClientHello("node-1.node.offload")


@pytest.mark.parametrize("data", [HELLO, in_records(HELLO, 7)])
def test_every_beginning_asks_for_more_and_never_for_too_much(data):
    for length in range(len(data)):
        wanted = parse_client_hello(data[:length])
        assert isinstance(wanted, int)
        assert length < wanted <= len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"SSH-2.0-x\r\n",
        b"\x16\x02\x00\x00\x05",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        b"\x15\x03\x01\x00\x02\x01\x00",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
    ],
)
def test_other_protocols_and_impossible_lengths_are_refused(data):
    with pytest.raises(NotClientHelloError):
        parse_client_hello(data)


def test_endless_hello_is_refused():
    record = b"\x16\x03\x01\x40\x00" + b"\x01\x00\xff\xff" + bytes((1 << 14) - 4)
    rest = b"\x16\x03\x01\x40\x00" + bytes(1 << 14)
    with pytest.raises(NotClientHelloError):
        parse_client_hello(record + rest * 4)


@given(st.binary(max_size=400))
@example(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00")
def test_garbage_is_refused_or_asks_for_more(data):
    try:
        found = parse_client_hello(data)
    except NotClientHelloError:
        return
    assert isinstance(found, ClientHello) or len(data) < found <= MAX_HELLO_BYTES + 5


@given(st.integers(5, len(HELLO) - 1), st.integers(0, 255))
def test_damaged_hello_never_raises_anything_else(position, value):
    damaged = bytearray(HELLO)
    damaged[position] = value
    try:
        found = parse_client_hello(damaged)
    except NotClientHelloError:
        return
    assert isinstance(found, ClientHello | int)


def test_alert_is_a_fatal_record():
    assert alert(112) == b"\x15\x03\x03\x00\x02\x02\x70"

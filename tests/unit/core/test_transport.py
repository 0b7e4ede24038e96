"""gRPC's text about a failed connection becomes a cause and a remedy."""

from __future__ import annotations

import grpc
import pytest

from offload_core.errors import AuthenticationError, GatewayUnreachableError, NodeLostError
from offload_core.status import error_from_rpc
from offload_core.transport import certificate_problem, short_reason

TLS = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls handshake "
    "failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
    "CERTIFICATE_VERIFY_FAILED: {}: OK"
)
REFUSED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect "
    "to remote host: Connection refused"
)


class Failure:
    """What is read of a grpc.RpcError."""

    def __init__(self, text: str) -> None:
        self._text = text

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> None:
        return None


@pytest.mark.parametrize(
    ("reason", "problem", "hint"),
    [
        ("certificate has expired", "has expired", "clock"),
        ("certificate is not yet valid", "is not yet valid", "clock"),
        ("self signed certificate in certificate chain", "not from the authority", "login"),
        ("unable to get local issuer certificate", "not from the authority", "login"),
    ],
)
def test_refused_certificate_is_told_with_a_remedy(reason: str, problem: str, hint: str) -> None:
    error = error_from_rpc(
        Failure(TLS.format(reason)), peer="the gateway at h:1", unreachable=GatewayUnreachableError
    )
    assert isinstance(error, AuthenticationError)
    assert error.message.startswith("the certificate of the gateway at h:1 ")
    assert problem in error.message
    assert hint in error.hint


def test_refused_connection_is_two_words() -> None:
    error = error_from_rpc(
        Failure(REFUSED), peer="the gateway at h:1", unreachable=GatewayUnreachableError
    )
    assert isinstance(error, GatewayUnreachableError)
    assert error.message == "the gateway at h:1 does not answer: connection refused"
    assert error.hint


def test_node_that_is_not_reached_stays_a_lost_node() -> None:
    text = TLS.format("certificate has expired")
    error = error_from_rpc(Failure(text), peer="the node", unreachable=NodeLostError)
    assert isinstance(error, NodeLostError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DNS resolution failed for h:1: Domain name not found", "its name is not known"),
        (
            (
                "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: "
                "Handshake read failed (Endpoint closing)"
            ),
            "the connection stays silent",
        ),
        (
            (
                "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:1: "
                "No route to host"
            ),
            "No route to host",
        ),
        ("Socket closed", "Socket closed"),
    ],
)
def test_other_texts(text: str, expected: str) -> None:
    assert certificate_problem(text) is None
    assert short_reason(text) == expected

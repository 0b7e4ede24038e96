"""The error tree on the wire and at the exit."""

from __future__ import annotations

import re
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from offload_core import errors
from offload_core.errors import (
    AccessDeniedError,
    AuthenticationError,
    GatewayUnreachableError,
    InternalError,
    NodeLostError,
    NotFoundError,
    OffloadError,
    QuotaExceededError,
    UsageError,
    VersionError,
    all_errors,
    error_for_reason,
    find_offload_error,
)
from offload_core.status import (
    MAX_MESSAGE_CHARACTERS,
    TRAILER,
    clipped,
    error_from_rpc,
    pack_status,
    unpack_status,
)

EVERY = all_errors()


class Failure:
    def __init__(self, code: grpc.StatusCode, text: str | None, *trailers: tuple[str, Any]) -> None:
        self._code, self._text, self._trailers = code, text, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._text

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._trailers


def from_rpc(failure: Failure) -> OffloadError:
    return error_from_rpc(failure, peer="the node", unreachable=NodeLostError)


def test_reasons_are_unique_and_each_class_has_one_of_its_own():
    reasons = [cls.reason for cls in EVERY]
    assert len(set(reasons)) == len(reasons) == 26
    assert all(error_for_reason(cls.reason) is cls for cls in EVERY)
    assert error_for_reason("NO_SUCH_REASON") is None


def test_exit_codes_are_those_of_the_documented_tree():
    documented = dict(re.findall(r"(\w+Error) .*exit +(\d+)", errors.__doc__ or ""))
    expected = {cls.__name__: str(cls.exit_code) for cls in EVERY}
    assert {**expected, **documented} == expected
    assert set(expected) - set(documented) <= {"OffloadError"}


def test_retryable_classes_are_those_with_documented_exit_codes():
    assert {cls.exit_code for cls in EVERY if cls.retryable} == {6, 7, 10, 11}
    assert {cls.exit_code for cls in EVERY if not cls.retryable} & {6, 7, 10, 11} == set()


@pytest.mark.parametrize("cls", EVERY)
def test_every_class_survives_the_wire(cls):
    data = pack_status(cls("Größe: 5 %\nline", hint="do this"))
    back = unpack_status(data)
    assert type(back) is cls
    assert (back.message, back.hint) == ("Größe: 5 %\nline", "do this")
    code = next(code for code in grpc.StatusCode if code.value[0] == cls.status_code)
    assert type(from_rpc(Failure(code, "x", (TRAILER, data)))) is cls


def test_what_is_not_ours_is_not_taken_for_ours():
    foreign = status_pb2.Status(code=5, message="x")
    for data in (b"", b"\xff\xff", foreign.SerializeToString()):
        assert unpack_status(data) is None
    other = pack_status(NotFoundError("x")).replace(b"offload", b"offlaod")
    assert unpack_status(other) is None


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, NodeLostError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, NodeLostError),
        (grpc.StatusCode.UNIMPLEMENTED, VersionError),
        (grpc.StatusCode.UNAUTHENTICATED, AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, AccessDeniedError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, UsageError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QuotaExceededError),
        (grpc.StatusCode.DATA_LOSS, InternalError),
    ],
)
def test_status_without_details_becomes_the_nearest_class(code, cls):
    error = from_rpc(Failure(code, None))
    assert type(error) is cls
    assert "the node" in error.message


def test_unreachable_peer_is_of_the_callers_class():
    failure = Failure(grpc.StatusCode.UNAVAILABLE, "refused")
    error = error_from_rpc(failure, peer="the gateway", unreachable=GatewayUnreachableError)
    assert type(error) is GatewayUnreachableError


def test_long_messages_are_clipped_for_trailers():
    short, long = NodeLostError("x" * 1000), NodeLostError("ü" * 50_000, hint="h")
    assert clipped(short) is short
    cut = clipped(long)
    assert (type(cut), len(cut.message), cut.hint) == (
        NodeLostError,
        MAX_MESSAGE_CHARACTERS + 3,
        "h",
    )
    assert len(pack_status(cut)) < 3000


def test_first_known_error_is_found_in_groups():
    known = NotFoundError("x")
    group = BaseExceptionGroup("g", [ValueError(), BaseExceptionGroup("h", [known])])
    assert find_offload_error(group) is known
    assert find_offload_error(BaseExceptionGroup("g", [ValueError()])) is None
    assert find_offload_error(KeyError()) is None

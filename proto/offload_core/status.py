"""Errors on the wire: `OffloadError` to and from google.rpc.Status with ErrorInfo.

Source: google/rpc/status.proto and error_details.proto; the status travels in the trailer
`grpc-status-details-bin` as all gRPC implementations do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from offload_core.errors import (
    AccessDeniedError,
    AuthenticationError,
    BuildCanceledError,
    GatewayUnreachableError,
    InternalError,
    NotFoundError,
    OffloadError,
    QuotaExceededError,
    UsageError,
    VersionError,
    error_for_reason,
)
from offload_core.transport import certificate_problem, short_reason

if TYPE_CHECKING:
    from collections.abc import Iterable

DOMAIN = "offload"
TRAILER = "grpc-status-details-bin"
GATEWAY_HINT = "check the address and your network, and that the gateway runs ('offload status')"
MAX_MESSAGE_CHARACTERS = 1000
"""A message travels twice, escaped and in base64; gRPC refuses more than 8 KiB of trailers."""

_BY_CODE: dict[int, type[OffloadError]] = {
    1: BuildCanceledError,
    3: UsageError,
    5: NotFoundError,
    7: AccessDeniedError,
    8: QuotaExceededError,
    16: AuthenticationError,
}


class RpcFailure(Protocol):
    """The part of grpc.RpcError that is read here, so that this module imports no grpc."""

    def code(self) -> object:
        """Return the grpc.StatusCode."""

    def details(self) -> str | None:
        """Return the message."""

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Return the trailers."""


def clipped(error: OffloadError) -> OffloadError:
    """Return an error whose message fits into trailers."""
    text = error.message
    if len(text) <= MAX_MESSAGE_CHARACTERS:
        return error
    return type(error)(f"{text[:MAX_MESSAGE_CHARACTERS]}...", hint=error.hint)


def pack_status(error: OffloadError) -> bytes:
    """Return the serialised google.rpc.Status of an error."""
    from google.rpc import error_details_pb2, status_pb2

    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if error.hint:
        info.metadata["hint"] = error.hint
    status = status_pb2.Status(code=error.status_code, message=error.message)
    status.details.add().Pack(info)
    if error.retry_after_seconds:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        status.details.add().Pack(retry)
    return cast("bytes", status.SerializeToString())


def unpack_status(data: bytes) -> OffloadError | None:
    """Return the error of a serialised google.rpc.Status, None when it carries none of ours."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    try:
        status = status_pb2.Status.FromString(data)
        retry = error_details_pb2.RetryInfo()
        for detail in status.details:
            if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                detail.Unpack(retry)
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                cls = error_for_reason(info.reason)
                if info.domain == DOMAIN and cls is not None:
                    error = cls(status.message, hint=info.metadata.get("hint", ""))
                    error.retry_after_seconds = retry.retry_delay.ToMilliseconds() / 1000
                    return error
    except DecodeError:
        return None
    return None


def error_from_rpc(
    failure: RpcFailure, *, peer: str, unreachable: type[OffloadError]
) -> OffloadError:
    """Return the error behind a failed call.

    Args:
        failure: a grpc.RpcError.
        peer: name of the other side for the sentence, for example "the gateway at HOST:PORT".
        unreachable: class for a peer that does not answer.
    """
    for key, value in failure.trailing_metadata() or ():
        if key == TRAILER:
            data = value if isinstance(value, bytes) else value.encode("latin-1")
            error = unpack_status(data)
            if error is not None:
                return error
    code = getattr(failure.code(), "value", (2, "unknown"))[0]
    text = failure.details() or "no reason given"
    if code in (4, 14):
        return _unreachable(peer, text, unreachable)
    if code == 12:
        return VersionError(f"{peer} does not know this call; it is older than this command")
    cls = _BY_CODE.get(code, InternalError)
    return cls(f"{peer} answered: {text}")


def _unreachable(peer: str, text: str, unreachable: type[OffloadError]) -> OffloadError:
    if not issubclass(unreachable, GatewayUnreachableError):
        return unreachable(f"{peer} does not answer: {short_reason(text)}")
    certificate = certificate_problem(text)
    if certificate is not None:
        return AuthenticationError(
            f"the certificate of {peer} {certificate.problem}", hint=certificate.hint
        )
    return unreachable(f"{peer} does not answer: {short_reason(text)}", hint=GATEWAY_HINT)

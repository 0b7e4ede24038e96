"""What an error of the S3 client means: nothing there, a refusal, a store that is ill or slow."""

from __future__ import annotations

from dataclasses import dataclass

import urllib3
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

MISSING = frozenset({"NoSuchKey", "NoSuchBucket", "ResourceNotFound", "NoSuchObject"})
NOTHING_THERE = frozenset({*MISSING, "InvalidRange"})
NO_SUCH_FEATURE = frozenset(
    {"NotImplemented", "MethodNotAllowed", "InvalidRequest", "InvalidArgument"}
)
DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem"})
_WHO_ARE_YOU = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidTokenId",
        "ExpiredToken",
        "InvalidSecurity",
        "RequestTimeTooSkewed",
    }
)
_HINTS = {
    "ExpiredToken": "the session token has ended; give new keys",
    "InvalidTokenId": "the session token has ended or is wrong; give new keys",
    "RequestTimeTooSkewed": "the clocks of this machine and of the store differ",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """A failed call.

    Attributes:
        cause: for people; without URLs, whose signatures are secrets.
        is_refusal: the store is well and said no to this request.
        is_final: asking again at once is useless.
    """

    cause: str
    is_refusal: bool = False
    is_final: bool = False


class NotRemovedError(Exception):
    """The store left objects in place that were to be removed; `code` is its reason."""

    def __init__(self, code: str) -> None:
        super().__init__(f"the store did not remove an object ({code})")
        self.code = code


def trouble_of(error: Exception) -> Trouble:
    """Return what an error of the client or of its connections means."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and isinstance(error.reason, Exception):
        return trouble_of(error.reason)
    if isinstance(error, S3Error):
        return _answered(error)
    if isinstance(error, NotRemovedError):
        return Trouble(str(error), is_refusal=error.code in DENIED)
    if isinstance(error, (ServerError, InvalidResponseError)):
        status = int(getattr(error, "status_code", 0) or getattr(error, "_code", 0) or 0)
        return Trouble(f"the store answered HTTP status {status}", is_refusal=400 <= status < 500)
    if isinstance(error, urllib3.exceptions.ResponseError):
        return Trouble(f"the store is not well ({str(error).removeprefix('too many ')})")
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return Trouble("no connection")
    if isinstance(error, (TimeoutError, urllib3.exceptions.TimeoutError)):
        return Trouble(_words(error) or "no answer in time", is_final=True)
    if isinstance(error, urllib3.exceptions.SSLError):
        reason = getattr(error.args[0] if error.args else None, "verify_message", "")
        hint = f" ({reason}); check s3_ca" if reason else ""
        return Trouble(f"no secure connection{hint}", is_final=bool(reason))
    if isinstance(error, (urllib3.exceptions.HTTPError, ConnectionError)):
        return Trouble("the connection broke")
    if isinstance(error, OSError):
        return Trouble(str(error))
    if isinstance(error, MinioException):
        return Trouble(type(error).__name__)
    return Trouble(f"the answer is damaged ({type(error).__name__})")


def _words(error: Exception) -> str:
    # What urllib3 says holds the URL.
    return "" if isinstance(error, urllib3.exceptions.HTTPError) else str(error)


def _answered(error: S3Error) -> Trouble:
    code = error.code or "nothing that is known"
    if code in _WHO_ARE_YOU:
        hint = _HINTS.get(code, f"access was refused ({code}); check the keys")
        return Trouble(hint, is_final=True)
    if code in DENIED:
        return Trouble(
            f"access was refused ({code}); check the keys and their policy", is_refusal=True
        )
    status = getattr(error.response, "status", 500)
    return Trouble(f"the store answered {code}", is_refusal=400 <= status < 500)

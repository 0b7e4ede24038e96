"""What can go wrong at an upstream registry. These errors stay in this package."""

from __future__ import annotations


class UpstreamError(Exception):
    """A registry did not give what was asked for; the text is for logs and holds no secret."""


class MissingError(UpstreamError):
    """The registry answers, and has no such thing."""


class DeniedError(UpstreamError):
    """The pool may not read this: the registry asks for another login."""


class AwayError(UpstreamError):
    """The registry does not answer, fails, or has too many requests; it may answer later."""


class RefusedError(UpstreamError):
    """Whoever judges what may be reached refused a host or address; the text says why."""


class UnfitError(UpstreamError):
    """The registry's answer is not what its digest names, or is of a kind that is not served."""

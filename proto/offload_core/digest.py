"""Content digests in the form of the OCI image specification, "Digests": `sha256:<64 hex>`."""

from __future__ import annotations

import hashlib
import re

_SHA256 = re.compile(r"sha256:[a-f0-9]{64}")


def is_digest(text: str) -> bool:
    """Return whether `text` is a SHA-256 digest in OCI form."""
    return _SHA256.fullmatch(text) is not None


def check_digest(value: object) -> str:
    """Return a value of a document that has to be a digest.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not is_digest(value):
        raise ValueError("not a digest")
    return value


def sha256_digest(data: bytes | bytearray | memoryview) -> str:
    """Return the OCI digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_hex(digest: str) -> str:
    """Return the 64 hex characters of an OCI digest.

    Raises:
        ValueError: `digest` is no SHA-256 digest; it must never become part of a path.
    """
    if not is_digest(digest):
        raise ValueError(f"not a sha256 digest: {digest[:100]!r}")
    return digest[7:]

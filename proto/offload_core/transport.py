"""What a failed connection means to a person: gRPC's text in a few words, and what to do. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

_VERIFY = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([\w ]+)")
_LAST = re.compile(r"last error: \w+: (?:\w+:\S+?: )?(?P<text>.+)$")
_CLOCK = "check the clock of this machine and of the gateway (timedatectl)"


class Certificate(NamedTuple):
    """Why a server's certificate is refused, and what to do."""

    problem: str
    hint: str


def certificate_problem(text: str) -> Certificate | None:
    """Return why TLS refuses the server, None when that is not what a text tells.

    Source: the reasons of OpenSSL's X509_verify_cert_error_string.
    """
    found = _VERIFY.search(text)
    if found is None:
        return None
    reason = found[1].strip().lower()
    if "expired" in reason:
        return Certificate(
            "has expired", f"{_CLOCK}; if it is right, restart the gateway, which renews it"
        )
    if "not yet valid" in reason:
        return Certificate("is not yet valid", _CLOCK)
    return Certificate(
        f"is not from the authority of your login ({reason})",
        "if the gateway was set up anew, ask its administrator for a token and run "
        "'offload login' again; otherwise somebody may be listening in between",
    )


def short_reason(text: str) -> str:
    """Return the cause at the end of gRPC's text about a connection that cannot be made."""
    if "Connection refused" in text:
        return "connection refused"
    if "DNS" in text or "Name or service not known" in text or "Domain name not found" in text:
        return "its name is not known"
    if "Handshake read failed" in text or "Deadline" in text:
        return "the connection stays silent"
    found = _LAST.search(text)
    return found["text"] if found else text

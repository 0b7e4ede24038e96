"""Taking secrets out of texts that a person hands to somebody else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offload_core.redaction import MASK, redact_values

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|private|authorization|api_?key|access_?key|"
    r"auth_?config|cookie|dsn|_key$|^key$|_pat$|_pwd$",
    re.IGNORECASE,
)
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
_JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?")
# Only from the beginning of a word: else long ones, as a node may send, take forever.
_ASSIGNED = re.compile(
    r"""(?P<name>["']?(?<![A-Za-z0-9_.-])[A-Za-z0-9_.-]*(?:token|secret|passw(?:or)?d|passphrase|credentials?|"""
    r"""private_?key|authorization|api_?key|access_?key|identitytoken|registrytoken|auth)["']?)"""
    r"""(?P<mark>\s*[:=]\s*)(?P<value>"[^"]*"|'[^']*'|(?:Bearer|Basic)\s+\S+|[^\s,;}\]]+)""",
    re.IGNORECASE,
)
_MIN_VALUE = 6
"""Shorter values of variables, such as "1", stand everywhere for something else."""


def scrub(text: str, environment: Mapping[str, str]) -> str:
    """Return a text without secrets.

    Masked are keys and certificates, tokens of ours and of identity providers, logins in addresses,
    whatever is assigned to a name that says so, and the values of variables of such names.

    Args:
        text: of any kind.
        environment: whose values must not be in it.
    """
    values = {
        value
        for name, value in environment.items()
        if len(value) >= _MIN_VALUE and _SECRET_NAME.search(name)
    }
    # The longest first, as one may be the beginning of another.
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _PEM.sub(MASK, text)
    text = _JWT.sub(MASK, text)
    text = _ASSIGNED.sub(lambda found: f"{found['name']}{found['mark']}{MASK}", text)
    event = {"text": text}
    redact_values(event)
    return str(event["text"])

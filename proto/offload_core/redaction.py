"""Masks secrets in what is logged, by the name of a key and by the form of a value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_SECRET_KEY = re.compile(
    r"(password|secret|token|authorization|private_key|credential)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"\bofl_[a-z0-9]+_[A-Za-z0-9_-]{16,}"
    r"|(?<=Bearer )\S+|(?<=Basic )\S+"
    # User information of a URL.
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    # A capability of the node's registry: 24 bytes; digests and revisions have other lengths.
    r"|(?<![0-9a-f])[0-9a-f]{48}(?![0-9a-f])"
)
MASK = "***"
_MAX_DEPTH = 6


def redact_values(event: MutableMapping[str, Any]) -> None:
    """Replace the secrets among the values of one event, nested ones included."""
    for key, value in event.items():
        event[key] = _masked(key, value, 0)


def _masked(key: str, value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if _SECRET_KEY.search(key) and not key.endswith("_id"):
        return MASK
    if isinstance(value, str):
        return _SECRET_VALUE.sub(MASK, value)
    if depth >= _MAX_DEPTH:
        return MASK
    if isinstance(value, Mapping):
        return {name: _masked(str(name), inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_masked("", inner, depth + 1) for inner in value]
    # It would be shown as text behind this point.
    return _SECRET_VALUE.sub(MASK, str(value))

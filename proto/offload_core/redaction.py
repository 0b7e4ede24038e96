"""Masks secrets in what is logged, by the name of a key and by the form of a value."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_SECRET_KEY = re.compile(
    r"(password|secret|token|authorization|private_key|credential)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"\bofl_[a-z0-9]+_[A-Za-z0-9_-]{16,}|(?<=Bearer )\S+|(?<=Basic )\S+")
MASK = "***"


def redact_values(event: MutableMapping[str, Any]) -> None:
    """Replace the secrets among the values of one event."""
    for key, value in event.items():
        if _SECRET_KEY.search(key) and not key.endswith("_id"):
            event[key] = MASK
        elif isinstance(value, str):
            event[key] = _SECRET_VALUE.sub(MASK, value)

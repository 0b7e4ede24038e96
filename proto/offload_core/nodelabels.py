"""Labels of nodes, by which members choose some for their sessions."""

from __future__ import annotations

import re

from offload_core.errors import InvalidValueError

MAX_LABEL = 100
"""Characters of a key, and of a value."""
MAX_LABELS = 100
"""Of one node."""
_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?")


def check_label(key: str, value: str) -> None:
    """Refuse what cannot be a label.

    Raises:
        InvalidValueError: it cannot be one.
    """
    if len(key) > MAX_LABEL or not _KEY.fullmatch(key):
        raise InvalidValueError(
            f"{key[:MAX_LABEL]!a} cannot be the key of a label",
            hint=f"use at most {MAX_LABEL} letters, digits and . _ / -, with a letter or a digit "
            "first and last",
        )
    if len(value) > MAX_LABEL or not value.isprintable():
        raise InvalidValueError(
            f"{value[:MAX_LABEL]!a} cannot be the value of the label {key}",
            hint=f"use at most {MAX_LABEL} characters, none of them for the control of terminals",
        )

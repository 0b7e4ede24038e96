"""Truth as Go's strconv.ParseBool reads it, which docker's flags and attributes use."""

from __future__ import annotations

TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
"""What Go's strconv.ParseBool takes for true."""
FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))


def parse_boolean(text: str) -> bool | None:
    """Return the truth of a text as Go's strconv.ParseBool sees it; None for any other text."""
    if text in TRUE:
        return True
    return False if text in FALSE else None

"""JSON of strangers: one meaning only, bounded, an object at the top.

Most parsers let the last of two equal names win, others the first; what a token says must not
depend on who reads it (RFC 8259, section 4; RFC 7519, section 4).
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 8
MAX_NAMES = 500


class StrictJsonError(ValueError):
    """The text is no JSON object, or an ambiguous or oversized one; the message says which."""


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Args:
        data: UTF-8; its size was bounded by the caller.
        what: begins the sentence of an error, for example "the header".

    Raises:
        StrictJsonError: see there.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except StrictJsonError as error:
        raise StrictJsonError(f"{what} {error}") from None
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"{what} is not JSON") from error
    if not isinstance(value, dict):
        raise StrictJsonError(f"{what} is not a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise StrictJsonError(f"{what} is nested more than {MAX_DEPTH} deep")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise StrictJsonError(f"has {name[:60]!a} twice")
        found[name] = value
    if len(found) > MAX_NAMES:
        raise StrictJsonError(f"has more than {MAX_NAMES} names")
    return found


def _no_constant(text: str) -> NoReturn:
    raise StrictJsonError(f"has {text}, which is not JSON")


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0

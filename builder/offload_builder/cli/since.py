"""Values of --since."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta


def parse_since(text: str | None) -> datetime | None:
    """Return a time: so long ago, or as RFC 3339 writes it; without a zone it is UTC.

    Raises:
        InvalidValueError: it is neither.
    """
    from offload_core.errors import ConfigError, InvalidValueError
    from offload_core.units import parse_duration

    if text is None:
        return None
    with contextlib.suppress(ConfigError):
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidValueError(
            f'"{text}" is no time for --since: write 2h, 7d or 2026-01-31T12:00'
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)

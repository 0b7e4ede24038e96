"""Sizes and durations as people write them."""

from __future__ import annotations

import re

from offload_core.errors import ConfigError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Return the bytes of "512", "20GiB", "1.5 GB" (powers of 1000 without the "i").

    Raises:
        ConfigError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f'"{text}" is not a size; write for example 512MiB or 20GB')
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def format_size(size_bytes: float) -> str:
    """Return bytes as docker prints them: "0B", "12.3kB", "101.9MB" (powers of 1000)."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g}TB"


def format_memory(size_bytes: float) -> str:
    """Return bytes of memory, which people count in powers of 1024: "64MiB", "1.5GiB"."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.4g}{unit}"
        value /= 1024
    return f"{value:.4g}GiB"


def parse_duration(text: str) -> float:
    """Return the seconds of "30s", "1h30m", "250ms", "7d".

    Raises:
        ConfigError: not a duration.
    """
    seconds, end = 0.0, 0
    for match in _DURATION_PART.finditer(text.strip()):
        if match.start() != end:
            break
        seconds += float(match[1]) * _SECONDS[match[2]]
        end = match.end()
    if end == 0 or end != len(text.strip()):
        raise ConfigError(f'"{text}" is not a duration; write for example 30s, 10m or 1h30m')
    return seconds


def format_duration(seconds: float) -> str:
    """Return "0.3s", "12.1s", "2m5s", "3h12m"."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m"

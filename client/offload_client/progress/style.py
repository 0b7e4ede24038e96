"""Colours of the interactive form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_RESET = "\x1b[0m"
_NAMES = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")


@dataclass(frozen=True, slots=True)
class Palette:
    """SGR parameters by meaning; an empty one is no colour."""

    run: str = ""
    """Completed steps."""
    cancel: str = ""
    warning: str = ""
    error: str = ""
    faint: str = ""
    """Output of running steps."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Palette:
        """Return what NO_COLOR and BUILDKIT_COLORS ask for; wrong parts are left out.

        BUILDKIT_COLORS is for example "run=green:error=255,80,80" (docs.docker.com, build
        variables); NO_COLOR with any value is no colour at all (no-color.org).
        """
        if environment.get("NO_COLOR"):
            return cls()
        values = {"run": "34", "cancel": "33", "warning": "33", "error": "31"}
        for part in environment.get("BUILDKIT_COLORS", "").split(":"):
            name, _, text = part.partition("=")
            code = _colour(text.strip().lower())
            if name.strip().lower() in values and code:
                values[name.strip().lower()] = code
        return cls(**values, faint="2")


def paint(text: str, code: str) -> str:
    """Return text in a colour."""
    return f"\x1b[{code}m{text}{_RESET}" if code and text else text


def _colour(text: str) -> str:
    if text == "default":
        return "39"
    light = text.startswith("light-")
    name = text.removeprefix("light-")
    if name in _NAMES:
        return str((90 if light else 30) + _NAMES.index(name))
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 3 and all(part.isdigit() and int(part) < 256 for part in parts):
        return "38;2;" + ";".join(parts)
    return ""

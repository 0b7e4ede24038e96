"""The specification of a step, as BuildKit has written it for runc."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES = 64 << 20
"""Arguments and variables have 6 MiB at most (execve(2)), each byte as up to six in JSON."""


def read_specification(bundle: Path) -> dict[str, Any]:
    """Return the specification in a step's bundle (OCI runtime specification, config.json).

    Raises:
        OSError: the step is gone.
        ValueError: it is no bundle.
    """
    with (bundle / "config.json").open("rb") as file:
        found: dict[str, Any] = json.loads(file.read(_MAX_BYTES))
    return found

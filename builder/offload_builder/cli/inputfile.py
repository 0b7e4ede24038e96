"""A file that a command is given, or standard input."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from offload_core.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def read_input(path: Path, limit_bytes: int) -> bytes:
    """Return the content of a file, of standard input for "-".

    Args:
        path: of the file.
        limit_bytes: whole KiB or MiB; more is not taken.

    Raises:
        UsageError: it cannot be read, or is longer.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(limit_bytes + 1)
        else:
            with path.open("rb") as file:
                data = file.read(limit_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit_bytes:
        limit = f"{limit_bytes >> 20} MiB" if limit_bytes >= 1 << 20 else f"{limit_bytes >> 10} KiB"
        raise UsageError(f"{path} has more than {limit}")
    return data

"""Small files of state, which are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace_small_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace the content of a file that one writer has; blocks.

    Args:
        path: of the file; its directory exists. What a crash leaves lies beside it under its name
            and ".new", and goes with the next write.
        data: everything.
        durable: it outlives a loss of power.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    scratch = path.with_name(f"{path.name}.new")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise

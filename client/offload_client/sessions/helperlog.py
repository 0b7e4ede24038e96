"""The log of a session's helper: small, and for its owner alone."""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import TextIOWrapper
    from pathlib import Path

MAX_BYTES = 256 << 10
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _OwnFile(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.fchmod(stream.fileno(), 0o600)
        return stream


def open_log(path: Path) -> logging.Logger:
    """Return a log of at most twice `MAX_BYTES`; one that cannot be written is silent."""
    log = logging.getLogger("offload.session")
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        handler: logging.Handler = _OwnFile(path, maxBytes=MAX_BYTES, backupCount=1)
    except OSError:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    log.addHandler(handler)
    return log


def log_tail(path: Path, max_bytes: int = 64 << 10) -> str:
    """Return the last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - max_bytes))
            return file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"no log: {error.strerror}"

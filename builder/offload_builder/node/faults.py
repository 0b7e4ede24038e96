"""Faults of the node's own disk as sentences for people."""

from __future__ import annotations

import errno
import sqlite3

from offload_core.errors import NodeLostError, OffloadError, QuotaExceededError


def storage_error(what: str, error: OSError | sqlite3.Error) -> OffloadError:
    """Return the error for something that the node could not store or read.

    Args:
        what: for the sentence "the node cannot ...", for example "store the build context".
        error: what the system said.
    """
    if is_full(error):
        return QuotaExceededError(
            f"the disk of the node is full, so it cannot {what}; "
            "ask your administrator to free space or build on another node"
        )
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return NodeLostError(f"the node cannot {what}: {reason or type(error).__name__}")


def is_full(error: BaseException) -> bool:
    """Return whether an error of a file or of SQLite means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # SQLite's first byte is the primary code; the rest says where it happened.
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.Error) and code is not None and code & 0xFF == 13

"""Asking the helper of a session: one line of JSON there, one back. No imports beyond Python's own.

Requests: `{"do": "status"}`, `{"do": "ports"}`, `{"do": "stop"}`, `{"do": "diagnose"}`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

ASK_SECONDS = 5.0
MAX_ANSWER = 64 << 20
"""Bytes; texts for a diagnosis are the longest."""


class HelperAwayError(Exception):
    """No helper answers."""


def ask_helper(path: Path | str, do: str, *, timeout: float = ASK_SECONDS) -> dict[str, Any]:
    """Return a helper's answer; blocks.

    Args:
        path: of its socket, `records.helper_socket`.
        do: what is wanted.
        timeout: seconds of silence.

    Raises:
        HelperAwayError: none listens, or it does not answer.
    """
    data = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            if _peer_uid(connection) != os.getuid():
                raise HelperAwayError("somebody else listens there")
            connection.sendall(json.dumps({"do": do}).encode() + b"\n")
            while not data.endswith(b"\n") and len(data) <= MAX_ANSWER:
                part = connection.recv(1 << 16)
                if not part:
                    break
                data += part
        answer: dict[str, Any] = json.loads(data)
    except (OSError, ValueError) as error:
        raise HelperAwayError(str(error)) from error
    return answer


def _peer_uid(connection: socket.socket) -> int:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", data)[1]
    return uid

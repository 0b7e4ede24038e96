"""The framing of the SSH agent protocol, in which each request has one reply.

Source: draft-ietf-sshm-ssh-agent, section 3: a length of 32 bits, big-endian, and so many bytes,
of which the first is the type.
"""

from __future__ import annotations

from offload_core.errors import UsageError

MAX_FRAME_BYTES = 256 * 1024
"""OpenSSH's bound (authfd.c, MAX_AGENT_REPLY_LEN, and AGENT_MAX_LEN of ssh-agent)."""
_LENGTH_BYTES = 4

FAILURE = b"\x00\x00\x00\x01\x05"
"""A reply: SSH_AGENT_FAILURE."""
REQUEST_IDENTITIES = 11
IDENTITIES_ANSWER = 12
SIGN_REQUEST = 13
SIGN_RESPONSE = 14
READING_REQUESTS = frozenset((REQUEST_IDENTITIES, SIGN_REQUEST))
"""Requests that change nothing at an agent; BuildKit's own client forwards only these."""


class FrameReader:
    """Cuts a stream of bytes into frames; holds at most one frame and what came with its end."""

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def partial(self) -> bool:
        """Whether the stream stands within a frame."""
        return bool(self._pending)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the frames that are whole now, each with its length in front.

        Raises:
            UsageError: a frame is empty or longer than an agent would take.
        """
        self._pending += data
        frames: list[bytes] = []
        while len(self._pending) >= _LENGTH_BYTES:
            size = int.from_bytes(self._pending[:_LENGTH_BYTES], "big")
            if not 0 < size <= MAX_FRAME_BYTES:
                raise UsageError("this is not the protocol of an SSH agent")
            if len(self._pending) < _LENGTH_BYTES + size:
                break
            frames.append(bytes(self._pending[: _LENGTH_BYTES + size]))
            del self._pending[: _LENGTH_BYTES + size]
        return frames


def frame(kind: int, *parts: bytes) -> bytes:
    """Return a message of a type."""
    body = bytes([kind]) + b"".join(parts)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def frame_kind(message: bytes) -> int:
    """Return the type of a frame."""
    return message[_LENGTH_BYTES]


def frame_body(message: bytes) -> bytes:
    """Return what follows the type."""
    return message[_LENGTH_BYTES + 1 :]


def string(data: bytes) -> bytes:
    """Return a string as the protocol writes it (RFC 4251, section 5)."""
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


def take_string(data: bytes) -> tuple[bytes, bytes]:
    """Return the string at the beginning, and the rest.

    Raises:
        UsageError: it is cut off.
    """
    size = int.from_bytes(data[:_LENGTH_BYTES], "big")
    if len(data) < _LENGTH_BYTES + size:
        raise UsageError("a message of the SSH agent protocol is cut off")
    return data[_LENGTH_BYTES : _LENGTH_BYTES + size], data[_LENGTH_BYTES + size :]

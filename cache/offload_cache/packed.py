"""One object that holds the newest contributions of a scope, for nodes that know none of them.

It is a copy and may be old: what counts is the listing of the contributions. Layout: a line, the
length of the head in four bytes, the head (JSON: identifiers and lengths), the documents.
"""

from __future__ import annotations

import struct

import orjson

from offload_core.errors import UsageError

MAX_PACKED_BYTES = 16 << 20
_MAGIC = b"offload contributions 1\n"
_LENGTH = struct.Struct(">I")


def pack_documents(documents: list[tuple[str, bytes]]) -> bytes:
    """Return the object with as many of the documents as fit, the first ones first."""
    head: list[tuple[str, int]] = []
    bodies: list[bytes] = []
    size_bytes = 0
    for contribution_id, body in documents:
        size_bytes += len(body) + 128
        if size_bytes > MAX_PACKED_BYTES - 1024:
            break
        head.append((contribution_id, len(body)))
        bodies.append(body)
    data = orjson.dumps(head)
    return b"".join([_MAGIC, _LENGTH.pack(len(data)), data, *bodies])


def unpack_documents(data: bytes) -> dict[str, bytes]:
    """Return the documents by identifier.

    Raises:
        UsageError: the object is damaged.
    """
    try:
        if not data.startswith(_MAGIC):
            raise ValueError("no such object")
        start = len(_MAGIC) + _LENGTH.size
        (length,) = _LENGTH.unpack(data[len(_MAGIC) : start])
        found = {}
        at = start + length
        for contribution_id, size_bytes in orjson.loads(data[start:at]):
            if not isinstance(contribution_id, str) or not 0 <= size_bytes <= len(data) - at:
                raise ValueError("a wrong length")
            found[contribution_id] = data[at : at + size_bytes]
            at += size_bytes
    except (TypeError, ValueError, struct.error) as error:
        raise UsageError("the packed cache contributions are damaged") from error
    return found

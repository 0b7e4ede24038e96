"""A client of registries that costs next to nothing, so that the server is what is measured.

It sends a file with sendfile(2) and throws away what it receives. Both registries get the very
bytes that Go's HTTP client would send.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Self

from benchmarks.model import BenchmarkError

if TYPE_CHECKING:
    from pathlib import Path

_PIECE_BYTES = 1 << 20
_CHUNK_BYTES = 32 << 10
"""What Go's HTTP client puts into one chunk when it does not know the length of a body."""
_TIMEOUT_SECONDS = 120.0


class Wire:
    """One connection to a registry; a context manager."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._address = address
        self._socket = socket.create_connection((host, int(port)), _TIMEOUT_SECONDS)
        self._buffer = bytearray(_PIECE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def pull(self, repository: str, digest: str) -> float:
        """Return the seconds that a GET of a blob takes, to its last byte."""
        began = time.monotonic()
        self._send("GET", f"/v2/{repository}/blobs/{digest}")
        _, headers, rest = self._answer(200)
        left = int(headers["content-length"]) - len(rest)
        view = memoryview(self._buffer)
        while left:
            count = self._socket.recv_into(view)
            if not count:
                raise BenchmarkError(f"{self._address} hung up with {left} bytes to go")
            left -= count
        return time.monotonic() - began

    def push(self, repository: str, digest: str, blob: Path) -> float:
        """Return the seconds that POST and PUT of a blob take, until it can be pulled."""
        size_bytes = blob.stat().st_size
        began = time.monotonic()
        upload = self._open(repository)
        self._send("PUT", _with_digest(upload, digest), length=size_bytes)
        with blob.open("rb") as file:
            self._socket.sendfile(file)
        self._answer(201)
        return time.monotonic() - began

    def push_chunked(self, repository: str, digest: str, blob: Path) -> float:
        """Return the seconds of a push as `docker push` makes it: PATCH of unknown length, PUT."""
        began = time.monotonic()
        upload = self._open(repository)
        self._send("PATCH", upload, length=None)
        with blob.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                self._socket.sendall(_chunks(piece))
        self._socket.sendall(b"0\r\n\r\n")
        _, headers, _ = self._answer(202)
        self._send("PUT", _with_digest(headers["location"], digest), length=0)
        self._answer(201)
        return time.monotonic() - began

    def _open(self, repository: str) -> str:
        self._send("POST", f"/v2/{repository}/blobs/uploads/", length=0)
        return self._answer(202)[1]["location"]

    def _send(self, method: str, target: str, *, length: int | None = 0) -> None:
        path = "/" + target.split("/", 3)[3] if target.startswith("http") else target
        body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        kind = "Content-Type: application/octet-stream"
        self._socket.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: {self._address}\r\n"
            f"{kind}\r\n{body}\r\n\r\n".encode()
        )

    def _answer(self, expected: int) -> tuple[int, dict[str, str], bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._socket.recv(_CHUNK_BYTES)
            if not piece:
                raise BenchmarkError(f"{self._address} hung up: {data!r}")
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        status = int(lines[0].split()[1])
        if status != expected:
            raise BenchmarkError(f"{self._address} answered {lines[0]}: {rest[:200]!r}")
        pairs = (line.partition(":") for line in lines[1:])
        return status, {name.lower(): value.strip() for name, _, value in pairs}, rest


def _with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


def _chunks(piece: bytes) -> bytes:
    parts = []
    for start in range(0, len(piece), _CHUNK_BYTES):
        part = piece[start : start + _CHUNK_BYTES]
        parts += [b"%x\r\n" % len(part), part, b"\r\n"]
    return b"".join(parts)

"""The server of the benchmark: a process of its own in the namespace of the world.

`python -m benchmarks.egress.streams STREAMS VISITS` takes two listening sockets, by number. A
client of the first one says "BYTES SECONDS" in a line, and gets so many bytes, as fast as it takes
them, or spread over the seconds when these are not 0. The second one ends what it accepts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import sys
import threading
import time
from functools import cache

BLOCK_BYTES = 1 << 20


@cache
def block() -> bytes:
    """Return what is sent again and again."""
    return random.Random(7).randbytes(BLOCK_BYTES)


def digest_of(size_bytes: int) -> str:
    """Return the SHA-256 of a stream of so many bytes, whole blocks."""
    found = hashlib.sha256()
    for _ in range(size_bytes // BLOCK_BYTES):
        found.update(block())
    return found.hexdigest()


def send(connection: socket.socket) -> None:
    """Serve one client."""
    with connection, contextlib.suppress(OSError):
        with connection.makefile("rb") as reader:
            size, pace = reader.readline().split()
        count = int(size) // BLOCK_BYTES
        began = time.monotonic()
        for number in range(count):
            due = began + float(pace) * number / count
            while (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            connection.sendall(block())


def _stream(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=send, args=(connection,), daemon=True).start()


def _end(listener: socket.socket) -> None:
    while True:
        listener.accept()[0].close()


def main(numbers: list[str]) -> None:
    """Serve until the process is ended.

    On a core of its own where there are two: the kernel would put server and client onto one core
    or onto two as it likes, and the same download takes twice as long or not. The client takes the
    last core by itself.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        os.sched_setaffinity(0, {min(cores)})
    streams, visits = (socket.socket(fileno=int(number)) for number in numbers)
    threading.Thread(target=_end, args=(visits,), daemon=True).start()
    _stream(streams)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A client of the benchmark that takes the time of small things, one after the other.

`python -m benchmarks.egress.visits connect HOST PORT COUNT` opens and ends connections;
`... lookup SERVER PORT COUNT FIRST` asks for so many names, from `nFIRST.names.test` on, or for
`n0.names.test` only when FIRST is -1. Both print seconds as a list in JSON.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

import dns.flags
import dns.message

DOMAIN = "names.test"
TIMEOUT_SECONDS = 5.0
_RESET = struct.pack("ii", 1, 0)


def connect(host: str, port: int, count: int) -> list[float]:
    """Return how long each of so many connections took to open."""
    found = []
    for _ in range(count):
        with socket.socket() as made:
            made.settimeout(TIMEOUT_SECONDS)
            # Ended by a reset: none is left to wait for its time, and no port is used up.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            began = time.perf_counter()
            made.connect((host, port))
            found.append(time.perf_counter() - began)
    return found


def lookup(server: str, port: int, count: int, first: int) -> list[float]:
    """Return how long each of so many names took to be answered.

    Raises:
        ValueError: an answer has no address.
    """
    found = []
    for number in range(count):
        name = f"n{first + number if first >= 0 else 0}.{DOMAIN}"
        query = dns.message.make_query(name, "A", use_edns=0).to_wire()
        with socket.socket(type=socket.SOCK_DGRAM) as made:
            made.settimeout(TIMEOUT_SECONDS)
            made.connect((server, port))
            began = time.perf_counter()
            made.send(query)
            reply = made.recv(4096)
            found.append(time.perf_counter() - began)
        if not dns.message.from_wire(reply).answer:
            raise ValueError(f"{name} has no address")
    return found


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    kind, host, *numbers = arguments
    work = {"connect": connect, "lookup": lookup}[kind]
    print(json.dumps(work(host, *map(int, numbers))))


if __name__ == "__main__":
    main(sys.argv[1:])

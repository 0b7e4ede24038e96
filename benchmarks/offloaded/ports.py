"""Cases `port-*`: connections to a published port of a container."""

from __future__ import annotations

import socket
import statistics
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model import BenchmarkError, Case
from benchmarks.offloaded.ground import IMAGE, Ground
from tests.fixtures.ports import free_port
from tests.fixtures.wan import entered

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from benchmarks.session import Session

BLOCKS = 1144
BYTES = BLOCKS << 20
BULK = Case(
    "port-bulk", "1.2 GB from a published port", "from the namespace of the engine", limit=4.0
)
HTTP = Case("port-http", "1 KB on a kept connection, p50, the difference", "", unit="ms", limit=1)
CASES = (BULK, HTTP)
REQUESTS = 300
SECONDS = 60.0
REQUEST = b"GET / HTTP/1.1\r\nHost: box\r\n\r\n"
BODY_BYTES = 1024
SEND = f"exec nc -ll -p 80 -e dd if=/dev/zero bs=1M count={BLOCKS}"
# A server that keeps connections, of what a busybox has.
ANSWER = (
    "cat > /s <<'END'\n#!/bin/sh\nend=$(printf '\\r')\n"
    f"body=$(head -c {BODY_BYTES} /dev/zero | tr '\\0' x)\n"
    'while read -r line; do [ "$line" = "$end" ] && printf '
    f"'HTTP/1.1 200 OK\\r\\nContent-Length: {BODY_BYTES}\\r\\n\\r\\n%s' \"$body\"; done\n"
    "END\nchmod 755 /s; exec nc -ll -p 80 -e /s"
)


def ports(session: Session, folder: Path) -> None:
    """Measure the cases."""
    with Ground(folder, ready=0) as ground:
        ground.start()
        ground.load()
        if session.wants(BULK.name):
            near, there = _published(ground, "bulk", SEND)
            found = session.interleave(
                BULK.name, {"session": _bulk(near), "direct": _bulk(there)}, runs=6
            )
            session.report(BULK.name, found["session"], found["direct"])
        if session.wants(HTTP.name):
            near, there = _published(ground, "http", ANSWER)
            found = session.interleave(
                HTTP.name, {"session": _requests(near), "direct": _requests(there)}, runs=6
            )
            pairs = zip(found["session"], found["direct"], strict=True)
            session.report(HTTP.name, [ours - theirs for ours, theirs in pairs])


def _published(
    ground: Ground, name: str, script: str
) -> tuple[Callable[[], socket.socket], Callable[[], socket.socket]]:
    """Run a server; return what connects to it from here, and from within the engine's network."""
    port = free_port()
    ground.docker(
        ground.session, "run", "-d", "--name", name, "-p", f"{port}:80", IMAGE, "sh", "-c", script
    )
    address, _ = ground.docker(
        ground.session, "inspect", "-f",
        "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name,
    )  # fmt: skip
    namespace = Path(f"/proc/{_daemon(ground)}/ns/net")

    def here() -> socket.socket:
        return _connected(nullcontext(), "127.0.0.1", port)

    def there() -> socket.socket:
        return _connected(entered(namespace), address, 80)

    for connect in (here, there):
        connect().close()
    return here, there


def _daemon(ground: Ground) -> int:
    for pid in chain.from_iterable(ground.engines()):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            return pid
    raise BenchmarkError("there is no dockerd in the engine")


def _connected(place: AbstractContextManager[object], host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + SECONDS
    with place:
        while True:
            try:
                made = socket.create_connection((host, port), SECONDS)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"{host}:{port} takes no connections") from error
                time.sleep(0.05)
            else:
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return made


def _bulk(connect: Callable[[], socket.socket]) -> Callable[[int], float]:
    def measure(_: int) -> float:
        with connect() as connection:
            began = time.perf_counter()
            count = 0
            while data := connection.recv(1 << 20):
                count += len(data)
            if count != BYTES:
                raise BenchmarkError(f"{count} of {BYTES} bytes came")
            return time.perf_counter() - began

    return measure


def _requests(connect: Callable[[], socket.socket]) -> Callable[[int], float]:
    def measure(_: int) -> float:
        taken = []
        with connect() as connection, connection.makefile("rb") as reader:
            for _ in range(REQUESTS):
                began = time.perf_counter()
                connection.sendall(REQUEST)
                while reader.readline() not in (b"\r\n", b""):
                    pass
                if len(reader.read(BODY_BYTES)) != BODY_BYTES:
                    raise BenchmarkError("the server has closed the connection")
                taken.append(time.perf_counter() - began)
        return 1000 * statistics.median(taken)

    return measure

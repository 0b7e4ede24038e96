"""The resident helper: runs builds for the commands of one user with warm imports and connections.

Started by the first build, gone after `IDLE_SECONDS` without one, or as soon as its code on disk
has changed. It holds certificates in memory only as long as a command would.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.cli.process import INTERRUPTED, TERMINATED, guarded, report
from offload_client.connections import Connections
from offload_client.invocation import Invocation, text_stream
from offload_client.resident.thin import DECLINED
from offload_core.errors import BuildCanceledError

if TYPE_CHECKING:
    from collections.abc import Mapping

IDLE_SECONDS = 900.0
MAX_REQUEST_BYTES = 4 << 20
REQUEST_SECONDS = 5.0
UMASK = 0o022


class Helper:
    """Serves one unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._stop = asyncio.Event()
        self._sources = _source_times()

    async def serve(self) -> None:
        """Listen until idle for long, or until the code has changed."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        scratch = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        os.umask(UMASK)
        listener.bind(str(scratch))
        listener.listen(16)
        scratch.replace(self._path)
        mine = self._path.stat().st_ino
        loop = asyncio.get_running_loop()
        try:
            async with Connections() as connections:
                accepting = loop.create_task(self._accept(listener, connections))
                try:
                    await self._until_idle()
                finally:
                    # Out of the way first, so that no new command finds a helper that ends.
                    with contextlib.suppress(OSError):
                        if self._path.stat().st_ino == mine:
                            self._path.unlink()
                    accepting.cancel()
                    if self._running:
                        await asyncio.wait(self._running)
        finally:
            listener.close()

    async def _until_idle(self) -> None:
        while True:
            self._idle.clear()
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await (self._stop if self._running else self._idle).wait()
            except TimeoutError:
                if not self._running:
                    return
            if self._stop.is_set():
                return

    async def _accept(self, listener: socket.socket, connections: Connections) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            self._idle.set()
            task = loop.create_task(self._serve_one(connection, connections))
            self._running.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._idle.set()

    async def _serve_one(self, connection: socket.socket, connections: Connections) -> None:
        descriptors: list[int] = []
        try:
            connection.setblocking(False)
            if _peer_uid(connection) != os.getuid():
                return
            async with asyncio.timeout(REQUEST_SECONDS):
                payload = await _receive(connection, descriptors)
            invocation, mask = _invocation(payload, descriptors)
            stale = self._stale()
            if mask != UMASK or stale:
                # Files would get other modes than the user expects, or the code is not the
                # installed one any more; the command runs in its own process.
                if stale:
                    self._stop.set()
                code = DECLINED
            else:
                code = await self._run(connection, invocation, connections)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(connection, code.to_bytes(4, "big"))
        except (OSError, TimeoutError, ValueError):
            # A command that went away, or no command of ours; it has nobody to tell.
            return
        finally:
            for file in descriptors:
                with contextlib.suppress(OSError):
                    os.close(file)
            connection.close()

    def _stale(self) -> bool:
        now = _source_times()
        return any(now.get(name) != time for name, time in self._sources.items())

    async def _run(
        self, connection: socket.socket, invocation: Invocation, connections: Connections
    ) -> int:
        from offload_client.cli.build import build

        loop = asyncio.get_running_loop()
        command = loop.create_task(guarded(invocation, build(invocation, connections)))
        signal_code = INTERRUPTED
        listening = loop.create_task(loop.sock_recv(connection, 1))
        try:
            while not command.done():
                await asyncio.wait((command, listening), return_when=asyncio.FIRST_COMPLETED)
                if listening.done() and not command.done():
                    signal = listening.result()
                    signal_code = TERMINATED if signal == b"T" else INTERRUPTED
                    command.cancel()
                    await asyncio.wait((command,))
            if command.cancelled():
                report(invocation, BuildCanceledError("canceled"))
                return signal_code
            return command.result()
        finally:
            listening.cancel()
            command.cancel()
            with contextlib.suppress(OSError, ValueError):
                invocation.stdout.flush()
                invocation.stderr.flush()


def _invocation(payload: bytes, descriptors: list[int]) -> tuple[Invocation, int]:
    fields = payload.decode("utf-8", "surrogateescape").split("\0")
    cwd, mask, count = fields[0], int(fields[1]), int(fields[2])
    if len(descriptors) != 3:
        raise ValueError("three descriptors are expected")
    environment: Mapping[str, str] = dict(
        field.split("=", 1) for field in fields[3 + count :] if "=" in field
    )
    invocation = Invocation(
        arguments=fields[3 : 3 + count],
        cwd=Path(cwd),
        environment=environment,
        stdin=descriptors[0],
        stdout=text_stream(descriptors[1]),
        stderr=text_stream(descriptors[2]),
        resident=True,
    )
    return invocation, mask


async def _receive(connection: socket.socket, descriptors: list[int]) -> bytes:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
    size = array.array("i").itemsize
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * size))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % size])
            descriptors.extend(received)
    while len(head) < 4:
        part = await loop.sock_recv(connection, 4 - len(head))
        if not part:
            raise ValueError("the request is cut off")
        head += part
    length = int.from_bytes(head, "big")
    if length > MAX_REQUEST_BYTES:
        raise ValueError("the request is too long")
    payload = bytearray()
    while len(payload) < length:
        part = await loop.sock_recv(connection, min(1 << 16, length - len(payload)))
        if not part:
            raise ValueError("the request is cut off")
        payload += part
    return bytes(payload)


def _peer_uid(connection: socket.socket) -> int:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", data)[1]
    return uid


def _source_times() -> dict[str, int]:
    """Return the modification times of our own loaded modules."""
    times: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.startswith("offload_"):
            with contextlib.suppress(OSError):
                times[name] = os.stat(file).st_mtime_ns  # noqa: PTH116 - hot
    return times


def main() -> None:
    """Serve the socket named on the command line."""
    # Everything a build needs is imported before the first command arrives.
    import grpc.aio  # noqa: F401

    import offload_client.build.runner
    import offload_client.cli.build  # noqa: F401

    async def serve() -> None:
        await Helper(Path(sys.argv[1])).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

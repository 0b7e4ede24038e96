"""The resident helper: runs builds for the commands of one user with warm imports and connections.

Started by the first build, gone after `IDLE_SECONDS` without one, or as soon as its code on disk
has changed. It holds certificates in memory only as long as a command would.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from offload_client.bytepipe import in_thread
from offload_client.cli.process import INTERRUPTED, TERMINATED, guarded, report
from offload_client.connections import Connections
from offload_client.resident.request import peer_uid, read_request
from offload_client.resident.thin import AGAIN, READY
from offload_core.aio import TaskSet
from offload_core.errors import BuildCanceledError

if TYPE_CHECKING:
    from offload_client.invocation import Invocation

IDLE_SECONDS = 900.0
REQUEST_SECONDS = 5.0
REPORT_SECONDS = 2.0
BACKLOG = 64


class Helper:
    """Serves one unix socket."""

    def __init__(self, path: Path, idle_seconds: float = IDLE_SECONDS) -> None:
        """Prepare.

        Args:
            path: of the socket; its directory belongs to the user alone.
            idle_seconds: end after so long without a command.
        """
        self._path = path
        self._idle_seconds = idle_seconds
        self._commands = TaskSet()
        self._running = 0
        self._changed = asyncio.Event()
        self._stopping = False
        self._sources = _source_times()

    async def serve(self) -> None:
        """Listen until idle for long, or until the code has changed; return at once if not alone.

        Raises:
            OSError: the socket cannot be made.
        """
        lock = os.open(
            self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        scratch = self._path.with_suffix(".new")
        try:
            listener.setblocking(False)
            scratch.unlink(missing_ok=True)
            listener.bind(str(scratch))
            listener.listen(BACKLOG)
            scratch.replace(self._path)
            async with Connections(persistent=True) as connections:
                accepting = TaskSet()
                accepting.start(self._accept(listener, connections), name="accept")
                await self._until_idle()
                # Out of the way first, so that no new command finds a helper that ends, and
                # another helper may start while the last builds of this one run.
                self._path.unlink(missing_ok=True)
                os.close(lock)
                lock = -1
                await accepting.close()
                listener.close()
                while not await self._commands.drain(self._idle_seconds):
                    continue
        finally:
            listener.close()
            if lock >= 0:
                os.close(lock)

    async def _until_idle(self) -> None:
        while not self._stopping:
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self._running else self._idle_seconds):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _accept(self, listener: socket.socket, connections: Connections) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            self._commands.start(self._serve_one(connection, connections), name="command")

    async def _serve_one(self, connection: socket.socket, connections: Connections) -> None:
        descriptors: list[int] = []
        self._running += 1
        self._changed.set()
        try:
            connection.setblocking(False)
            await self._serve_request(connection, descriptors, connections)
        except (OSError, TimeoutError, ValueError):
            # A command that went away, or no command of ours; it has nobody to tell.
            return
        finally:
            for file in descriptors:
                with contextlib.suppress(OSError):
                    os.close(file)
            connection.close()
            self._running -= 1
            self._changed.set()

    async def _serve_request(
        self, connection: socket.socket, descriptors: list[int], connections: Connections
    ) -> None:
        if peer_uid(connection) != os.getuid():
            return
        if self._stale():
            # The code is not the installed one any more; the command runs in its own process.
            self._stopping = True
            return
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(REQUEST_SECONDS):
            await loop.sock_sendall(connection, READY)
            request = await read_request(connection, descriptors)
        code = await self._run(connection, request, connections)
        # Modules that this command has loaded are watched from now on.
        self._sources = {**_source_times(), **self._sources}
        await loop.sock_sendall(connection, code.to_bytes(4, "big"))

    async def _signals(
        self, connection: socket.socket, invocation: Invocation, command: asyncio.Future[int]
    ) -> int:
        """Return the exit code for a command that a signal ends, or the end of its process."""
        loop = asyncio.get_running_loop()
        interrupts = invocation.interrupts
        ended = False
        handled = False

        def end() -> None:
            nonlocal ended
            ended = True
            # Also when the user says so later, in answer to a question.
            command.cancel()

        def answered() -> None:
            nonlocal handled
            handled = True

        interrupts.cancel, interrupts.answered = end, answered
        while not ended:
            try:
                received = await loop.sock_recv(connection, 1)
                interrupts.vanished = not received
                if received != b"I":
                    return TERMINATED if received == b"T" else INTERRUPTED
                handled = False
                interrupts.arrived()
                if handled:
                    await loop.sock_sendall(connection, AGAIN)
            except OSError:
                return INTERRUPTED
        return INTERRUPTED

    def _stale(self) -> bool:
        now = _source_times()
        return any(now.get(name) != time for name, time in self._sources.items())

    async def _run(
        self, connection: socket.socket, invocation: Invocation, connections: Connections
    ) -> int:
        from offload_client.cli.build import build

        command = asyncio.ensure_future(guarded(invocation, build(invocation, connections)))
        signals = asyncio.ensure_future(self._signals(connection, invocation, command))
        code = 0
        try:
            await asyncio.wait((command, signals), return_when=asyncio.FIRST_COMPLETED)
            if signals.done():
                code = signals.result()
                command.cancel()
            # However long that takes: the descriptors are in use until then.
            await asyncio.wait((command,))
        finally:
            signals.cancel()
        if command.cancelled():
            canceled = BuildCanceledError("canceled")
            telling = in_thread(lambda: report(invocation, canceled), name="report")
            await asyncio.wait((telling,), timeout=REPORT_SECONDS)
            return code or INTERRUPTED
        result = command.result()
        # Cancelling may end in an error of something that was interrupted.
        return code if code and result else result


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
    import importlib

    # Everything a build needs is imported before the first command arrives.
    for name in (
        "grpc.aio",
        "google.rpc.error_details_pb2",
        "offload_client.build.runner",
        "offload_client.cli.build",
        "offload_client.context.scan",
        "offload_client.context.statindex",
        "offload_client.dockerauth",
        "offload_client.load.loader",
        "offload_client.progress.plain",
        "offload_client.progress.tty",
        "docker",
        "zstandard",
    ):
        # Two of them are optional for a client.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # What is loaded stays; the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    path = Path(sys.argv[1])
    idle_seconds = float(sys.argv[2]) if len(sys.argv) > 2 else IDLE_SECONDS

    async def serve() -> None:
        await Helper(path, idle_seconds).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

"""The process that keeps one directory of a session (`python -m`, started by `workerlink`).

Containers do what they want with the files, and are root in their session. So the process enters
the user and mount namespaces of the session's engine before the first look at a file: whatever
link it is made to follow leads to something of the same session, and it may do there what the
engine may, and nothing to the node. It loads all its code before, for none of it is to be found
there, and the way back is closed.

Frames on the socket are messages of SessionSyncService; an empty one from the node says that the
client is gone. The first frame is JSON and says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import google.rpc.error_details_pb2 as _loaded_early  # noqa: F401
import pyfastcdc as _chunks  # noqa: F401
import zstandard as _zstandard  # noqa: F401

from offload_builder.node.sessions.sync.frames import read_frame, write_frame
from offload_builder.node.sessions.sync.nodeside import NodeSide
from offload_core.errors import OffloadError, find_offload_error
from offload_proto.v1.session_sync_service_pb2 import SyncRequest, SyncResponse

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)

ERROR_PREFIX = "\0"
"""A warning that begins so is why the directory cannot be synchronised any more."""


def enter(pid: int) -> None:
    """Move this process, which has one thread, to the namespaces of an engine.

    Args:
        pid: first process of the engine, in the node's numbers.

    Raises:
        OSError: the engine has ended, or the system refuses.
    """
    namespaces = [
        (os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind)
        for name, kind in (("user", _CLONE_NEWUSER), ("mnt", _CLONE_NEWNS))
    ]
    os.setgroups([])
    for descriptor, kind in namespaces:
        if _libc.setns(descriptor, kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        os.close(descriptor)
    # The node's own user has no name in there.
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    os.chdir("/")
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _first(connection: socket.socket) -> dict[str, Any]:
    """Return the first frame, read without a loop: a loop may start threads."""
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        # Byte by byte at the end, so that nothing of the next frame is taken.
        want = 4 - len(data) if len(data) < 4 else 4 + int.from_bytes(data[:4], "big") - len(data)
        more = connection.recv(want)
        if not more:
            raise EOFError
        data += more
    found: dict[str, Any] = json.loads(data[4:])
    return found


async def _serve(connection: socket.socket, place: Path, shown: str) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    writing = asyncio.Lock()
    failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def send(response: SyncResponse) -> None:
        async with writing:
            await write_frame(writer, response.SerializeToString())

    def failed(error: BaseException) -> None:
        if not failure.done():
            failure.set_result(error)

    side = NodeSide(place, shown, send, failed)

    async def receive() -> None:
        while (frame := await read_frame(reader)) is not None:
            if not frame:
                await side.disconnected()
                continue
            await side.handle(SyncRequest.FromString(frame))

    receiving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((receiving, failure), return_when=asyncio.FIRST_COMPLETED)
        error = failure.result() if failure.done() else receiving.exception()
        if error is not None:
            with contextlib.suppress(OSError):
                await send(SyncResponse(warning=ERROR_PREFIX + json.dumps(_told(error))))
    finally:
        receiving.cancel()
        with contextlib.suppress(OSError):
            await side.aclose()
        writer.close()


def _told(error: BaseException) -> dict[str, str]:
    found = find_offload_error(error)
    if found is not None:
        return {"reason": found.reason, "message": found.message, "hint": found.hint}
    text = f"{type(error).__name__}: {error}"
    return {"reason": "NODE_LOST", "message": f"the session cannot keep the directory: {text}"}


def main() -> None:
    """Run the worker on the socket whose number is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        first = _first(connection)
        if first["pid"]:
            enter(int(first["pid"]))
        os.umask(0o022)
        connection.setblocking(False)
        asyncio.run(_serve(connection, Path(first["place"]), str(first["shown"])))
    except (EOFError, OSError, OffloadError) as error:
        # The node hears of it by the end of the socket.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - its log
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

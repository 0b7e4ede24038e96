"""The node's side of the process that keeps one directory of a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.node.sessions.sync.frames import read_frame, write_frame
from offload_builder.node.sessions.sync.worker import ERROR_PREFIX
from offload_core.errors import NodeLostError, error_for_reason
from offload_core.sparselog import SparseLog
from offload_proto.v1.session_sync_service_pb2 import SyncResponse

if TYPE_CHECKING:
    from pathlib import Path

    from offload_proto.v1.session_sync_service_pb2 import SyncRequest

log = SparseLog(structlog.get_logger(__name__))

_END_SECONDS = 5.0
_LOG_BYTES = 2000


class SyncWorker:
    """A process for one directory; an async context manager that ends it.

    Args:
        pid: first process of the engine whose namespaces it enters; None to stay outside.
        place: directory for the copy, as the process sees it.
        shown: the same, as it is called in the session.
    """

    def __init__(self, pid: int | None, place: Path, shown: str) -> None:
        self._pid = pid
        self._place = place
        self._shown = shown
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._writing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Start it.

        Raises:
            NodeLostError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "offload_builder.node.sessions.sync.worker",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )  # fmt: skip
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            place = {"pid": self._pid or 0, "place": str(self._place), "shown": self._shown}
            await write_frame(self._writer, json.dumps(place).encode())
        except OSError as error:
            await self.aclose()
            raise NodeLostError("the worker of a synchronised directory does not start") from error
        except BaseException:
            await self.aclose()
            raise
        finally:
            theirs.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it; harmless when done twice."""
        if self._writer is not None:
            self._writer.close()
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                said = await process.stderr.read(_LOG_BYTES) if process.stderr is not None else b""
                await process.wait()
                if said:
                    log.warning("sync.worker.ended", output=said.decode(errors="replace"))

    async def send(self, request: SyncRequest) -> None:
        """Hand a message on.

        Raises:
            NodeLostError: the process is gone.
        """
        await self._write(request.SerializeToString())

    async def disconnected(self) -> None:
        """Say that the client is gone.

        Raises:
            NodeLostError: the process is gone.
        """
        await self._write(b"")

    async def receive(self) -> SyncResponse:
        """Return its next message.

        Raises:
            NodeLostError: the process is gone.
            OffloadError: the directory cannot be synchronised any more.
        """
        if self._reader is None:
            raise _gone()
        try:
            frame = await read_frame(self._reader)
        except (OSError, EOFError) as error:
            raise _gone() from error
        if frame is None:
            raise _gone()
        response = SyncResponse.FromString(frame)
        if response.warning.startswith(ERROR_PREFIX):
            told = json.loads(response.warning.removeprefix(ERROR_PREFIX))
            kind = error_for_reason(told["reason"]) or NodeLostError
            raise kind(told["message"], hint=told.get("hint", ""))
        return response

    async def _write(self, data: bytes) -> None:
        if self._writer is None:
            raise _gone()
        try:
            async with self._writing:
                await write_frame(self._writer, data)
        except OSError as error:
            raise _gone() from error


def _gone() -> NodeLostError:
    return NodeLostError("the worker of a synchronised directory has ended")

"""The byte pipe below a session: HTTP/2 inside the messages of a Control.Session call.

BuildKit is the client in the tunnel and we are the server. Source: BuildKit's session package and
session/grpchijack.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from offload_builder.buildkit.h2.client import GrpcClient
from offload_builder.buildkit.h2.connection import Http2Connection
from offload_builder.buildkit.h2.messages import GrpcError, varint
from offload_builder.buildkit.h2.server import GrpcServer
from offload_builder.buildkit.h2.stream import ConnectionLostError
from offload_core.aio import TaskSet
from offload_proto.buildkit.control_pb2 import BytesMessage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from offload_builder.buildkit.h2.client import ClientCall
    from offload_builder.buildkit.h2.server import ServerCall

_METHOD = "/moby.buildkit.v1.Control/Session"
_CLOSE_SECONDS = 2.0


class SessionTunnel:
    """An open tunnel that serves `handlers`; has a connection to the daemon of its own.

    `lost` is set when the tunnel ended although nobody closed it; `reason` then says why.
    """

    def __init__(
        self,
        socket_path: Path,
        metadata: Sequence[tuple[str, str]],
        handlers: Mapping[str, Callable[[ServerCall], Awaitable[None]]],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._client = GrpcClient(socket_path)
        self._metadata = metadata
        self._server = GrpcServer(handlers, on_failure)
        self._http2 = Http2Connection(self._send, client=False, on_stream=self._server.accept)
        self._tasks = TaskSet()
        self._call: ClientCall | None = None
        self._closing = False
        self.lost = asyncio.Event()
        self.reason = ""

    async def __aenter__(self) -> Self:
        """Open the tunnel.

        Raises:
            GrpcError: the daemon does not answer.
        """
        try:
            self._call = await self._client.call(_METHOD, self._metadata)
        except BaseException:
            await self._client.close()
            raise
        self._http2.start()
        self._tasks.start(self._pump(self._call), name="session-tunnel")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        await self._server.close()
        await self._http2.close(_CLOSE_SECONDS)
        if self._call is not None:
            self._call.end()
            await self._call.__aexit__()
        await self._tasks.close()
        await self._client.close()

    async def _send(self, pieces: list[bytes | memoryview]) -> None:
        if self._call is None:
            raise ConnectionLostError("the tunnel is not open")
        size = sum(map(len, pieces))
        prefix = b"\x0a" + varint(size)
        try:
            await self._call.send([prefix, *pieces], len(prefix) + size)
        except GrpcError as error:
            raise ConnectionLostError(error.message) from error

    async def _pump(self, call: ClientCall) -> None:
        reason = "the daemon ended the session"
        try:
            while messages := await call.receive():
                for message in messages:
                    self._http2.feed(BytesMessage.FromString(message).data)
                if self._http2.ended.is_set():
                    reason = str(self._http2.lost or "HTTP/2 error in the session")
                    break
        except GrpcError as error:
            reason = f"{reason}: {error.message}"
        self._http2.lose(reason)
        if not self._closing:
            self.reason = reason
            self.lost.set()

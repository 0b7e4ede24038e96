"""One client's connection to the registry, with bounds on what is not a request yet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import structlog
from aiohttp import web

from offload_cache.registry.responses import RegistryError, error_answer

if TYPE_CHECKING:
    from aiohttp.web_request import BaseRequest

_log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 512
"""A daemon uses some ten; the rest of the node needs file descriptors, too."""
MAX_STRANGERS = 128
"""Connections without a request that knew a secret. A build step that can reach the registry must
not be able to keep BuildKit out: the oldest stranger makes room for the newest."""
_IDLE_SECONDS = 120.0
"""For the head of a request, and between two. Go's clients close idle connections after 90 s."""
_MAX_LINE_BYTES = 8 << 10


class Connection(web.RequestHandler):
    """A connection. What is no HTTP is answered in the registry's JSON form, too."""

    __slots__ = ("_refused", "_strangers")

    def __init__(
        self,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
        strangers: dict[Connection, None],
        *,
        read_buffer_bytes: int,
    ) -> None:
        """Set the strangers of the listener, the oldest first; connections add themselves."""
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=_IDLE_SECONDS,
            access_log=None,  # type: ignore[arg-type] # its lines would hold capabilities
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
            read_bufsize=read_buffer_bytes,
            # A body is kept byte by byte as it came: its digest names these bytes.
            auto_decompress=False,
        )
        self._refused = len(server.connections) >= MAX_CONNECTIONS
        self._strangers = strangers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to read, or close when there are too many connections."""
        if self._refused:
            _log.warning("registry.connection.refused", limit=MAX_CONNECTIONS)
            cast(asyncio.Transport, transport).abort()
            return
        super().connection_made(transport)
        self.estrange()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._strangers.pop(self, None)
        super().connection_lost(exc)

    def welcome(self) -> None:
        """Note that a request of this connection knew a secret."""
        self._strangers.pop(self, None)

    def estrange(self) -> None:
        """Note that no request of this connection knew a secret so far."""
        self._strangers.pop(self, None)
        while len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            if oldest.transport is not None:
                oldest.transport.abort()
        self._strangers[self] = None

    def handle_error(
        self,
        request: BaseRequest,  # noqa: ARG002 - aiohttp's signature
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it repeats what was sent
    ) -> web.StreamResponse:
        """Answer a request that the parser refuses, or one whose answer failed."""
        if status < 500:
            error = RegistryError(status, "UNSUPPORTED", "this is no valid HTTP request")
        else:
            _log.error("registry.request.crashed", error=repr(exc))
            error = RegistryError(500, "UNKNOWN", "the registry failed")
        response = error_answer(error)
        response.force_close()
        return response

"""The registry's listener."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

import structlog
from aiohttp import web

from offload_cache.registry.blobs import BlobHandlers
from offload_cache.registry.connections import Connection
from offload_cache.registry.discovery import DiscoveryHandlers
from offload_cache.registry.grants import CAPABILITY_CHARACTERS
from offload_cache.registry.manifests import ManifestHandlers
from offload_cache.registry.responses import (
    STATISTICS,
    UNKNOWN_NAME,
    RegistryError,
    errors_as_json,
    name_version,
)
from offload_cache.registry.sessions import UploadLimits
from offload_cache.registry.uploads import UploadHandlers
from offload_cache.statistics import CacheStatistics
from offload_core.aio import TaskSet
from offload_core.errors import InternalError, NotFoundError
from offload_core.trust import join_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from offload_cache.registry.grants import Registry

_log = structlog.get_logger(__name__)

_NAME = f"[a-f0-9]{{{CAPABILITY_CHARACTERS}}}"
_BASE = f"/v2/{{capability:{_NAME}}}/{{repository:cache|image}}"
_CAPABILITY = re.compile(rf"/v2/({_NAME})/(?:cache|image)/")
_READ_BUFFER_BYTES = 256 << 10
_SHUTDOWN_SECONDS = 5.0
_SWEEPS_PER_IDLE = 8
DEFAULT_LIMITS = UploadLimits()


def make_application(
    registry: Registry,
    statistics: CacheStatistics,
    *,
    limits: UploadLimits = DEFAULT_LIMITS,
    extra: Iterable[web.RouteDef] = (),
) -> web.Application:
    """Return the registry as an aiohttp application.

    Args:
        registry: the capabilities in force.
        statistics: counters to use.
        limits: of uploads.
        extra: routes that decide for themselves who may use them: no capability is asked for.
            Their errors get the registry's JSON form, too.
    """
    extra = tuple(extra)
    open_handlers = {route.handler for route in extra}

    @web.middleware
    async def known_capability(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        connection = request.protocol if isinstance(request.protocol, Connection) else None
        if request.path in {"/v2", "/v2/"}:
            return await handler(request)
        if request.match_info.handler in open_handlers:
            # They look for a secret themselves, and may send for long when they find it.
            if connection is not None:
                connection.welcome()
            try:
                return await handler(request)
            except Exception:
                if connection is not None:
                    connection.estrange()
                raise
        # Also for what no route takes: only who has the capability learns what is wrong.
        match = _CAPABILITY.match(request.path)
        try:
            registry.state(match[1] if match else "")
        except NotFoundError:
            raise RegistryError(*UNKNOWN_NAME) from None
        if connection is not None:
            connection.welcome()
        return await handler(request)

    async def version(_: web.Request) -> web.Response:
        return web.json_response({})

    application = web.Application(middlewares=[errors_as_json, known_capability])
    application[STATISTICS] = statistics
    application.on_response_prepare.append(name_version)
    application.router.add_get("/v2/", version)
    application.router.add_get("/v2", version)
    for handlers in (
        UploadHandlers(registry, limits),
        BlobHandlers(registry),
        ManifestHandlers(registry),
        DiscoveryHandlers(registry),
    ):
        application.router.add_routes(handlers.routes(_BASE))
    application.router.add_routes(extra)
    return application


class RegistryServer:
    """Serves a registry over plain HTTP; an async context manager.

    Args:
        registry: the capabilities; they are revoked when the server ends.
        statistics: counters to use.
        host: the address to listen on: loopback, or the node's side of a project's veth.
        port: 0 for any free one.
        limits: of uploads.
        extra: routes that are served beside the registry, see `make_application`.
    """

    def __init__(
        self,
        registry: Registry,
        statistics: CacheStatistics | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: UploadLimits = DEFAULT_LIMITS,
        extra: Iterable[web.RouteDef] = (),
    ) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        self._limits = limits
        self._tasks = TaskSet(self._crashed)
        self._listener: asyncio.Server | None = None
        self._strangers: dict[Connection, None] = {}
        self._runner = web.AppRunner(
            make_application(registry, statistics or CacheStatistics(), limits=limits, extra=extra),
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        _log.error("registry.task.failed", task=name, error=repr(error))

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listener = socket.create_server((self._host, self._port), family=family, backlog=256)
            self._host, self._port = listener.getsockname()[:2]
            self._listener = await self._serve(listener)
        except BaseException:
            await self._runner.cleanup()
            raise
        self._tasks.start(self._sweep(), name="uploads.sweep")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._listener is not None:
            self._listener.close()
        await self._tasks.close()
        await self._runner.cleanup()
        await self._registry.close()

    async def _serve(self, listener: socket.socket) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        if server is None:
            raise InternalError("the registry's server was not set up")
        strangers = self._strangers
        return await loop.create_server(
            lambda: Connection(server, loop, strangers, read_buffer_bytes=_READ_BUFFER_BYTES),
            sock=listener,
        )

    @asynccontextmanager
    async def at(self, listener: socket.socket) -> AsyncIterator[str]:
        """Serve at one more place while the context is open.

        Args:
            listener: listens, maybe in another network namespace; it is closed at the end.

        Yields:
            The place's `HOST:PORT`.
        """
        host, port = listener.getsockname()[:2]
        more = await self._serve(listener)
        try:
            yield join_address(host, port)
        finally:
            more.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._limits.idle_seconds / _SWEEPS_PER_IDLE)
            await self._registry.end_expired_uploads()

    @property
    def address(self) -> str:
        """`HOST:PORT`, the first part of an image reference."""
        return join_address(self._host, self._port)

"""The registry's listener."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Self

from aiohttp import web

from offload_cache.registry.blobs import BlobHandlers
from offload_cache.registry.manifests import ManifestHandlers
from offload_cache.registry.responses import (
    STATISTICS,
    UNKNOWN_NAME,
    RegistryError,
    errors_as_json,
)
from offload_cache.statistics import CacheStatistics
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_cache.registry.grants import Registry

_BASE = "/v2/{capability:[a-f0-9]{48}}/{repository:cache|image}"
_READ_BUFFER_BYTES = 1 << 20
_SHUTDOWN_SECONDS = 5.0
DEFAULT_MAX_BLOB_BYTES = 32 << 30


def make_application(
    registry: Registry,
    statistics: CacheStatistics,
    *,
    max_blob_bytes: int = DEFAULT_MAX_BLOB_BYTES,
) -> web.Application:
    """Return the registry as an aiohttp application."""

    @web.middleware
    async def known_capability(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        capability = request.match_info.get("capability")
        if capability is None and request.path not in {"/v2", "/v2/"}:
            raise RegistryError(*UNKNOWN_NAME)
        if capability is not None:
            try:
                registry.state(capability)
            except NotFoundError:
                raise RegistryError(*UNKNOWN_NAME) from None
        return await handler(request)

    async def version(_: web.Request) -> web.Response:
        return web.json_response({})

    application = web.Application(middlewares=[errors_as_json, known_capability])
    application[STATISTICS] = statistics
    application.router.add_get("/v2/", version)
    application.router.add_get("/v2", version)
    application.router.add_routes(
        BlobHandlers(registry, max_blob_bytes=max_blob_bytes).routes(_BASE)
    )
    application.router.add_routes(ManifestHandlers(registry).routes(_BASE))
    return application


class RegistryServer:
    """Serves a registry over plain HTTP; an async context manager.

    Args:
        registry: the capabilities; they are revoked when the server ends.
        statistics: counters to use.
        host: the address to listen on: loopback, or the node's side of a project's veth.
        port: 0 for any free one.
        max_blob_bytes: largest blob that is taken in.
    """

    def __init__(
        self,
        registry: Registry,
        statistics: CacheStatistics | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_blob_bytes: int = DEFAULT_MAX_BLOB_BYTES,
    ) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        self._runner = web.AppRunner(
            make_application(
                registry, statistics or CacheStatistics(), max_blob_bytes=max_blob_bytes
            ),
            access_log=None,  # its lines would hold capabilities
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_SECONDS,
            read_bufsize=_READ_BUFFER_BYTES,
        )

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listener = socket.create_server((self._host, self._port), family=family, backlog=256)
            self._host, self._port = listener.getsockname()[:2]
            await web.SockSite(self._runner, listener).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._runner.cleanup()
        await self._registry.close()

    @property
    def address(self) -> str:
        """`HOST:PORT`, the first part of an image reference."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

"""Counters for Prometheus over plain HTTP, without login."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import structlog
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from offload_core.aio import TaskSet
from offload_core.errors import ConfigError
from offload_core.trust import join_address, split_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from prometheus_client import CollectorRegistry

log = structlog.get_logger(__name__)

DEFAULT_PORT = 9464
REQUEST_SECONDS = 10.0
MAX_HEADER_BYTES = 16 << 10
MAX_SCRAPES = 8
"""At a time; more are turned away."""
PATH = b"/metrics"


class MetricsPort:
    """Answers `GET /metrics`; an async context manager.

    Args:
        address: HOST:PORT; empty for no port at all.
        registry: what is shown.
        refresh: awaited before each answer, for counters that live elsewhere.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._wanted = address
        self._registry = registry
        self._refresh = refresh
        self._server: asyncio.Server | None = None
        self._scrapes = TaskSet()
        self._open = 0
        self.address = ""
        """HOST:PORT that is listened on; empty where nothing is."""

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            ConfigError: it cannot.
        """
        if not self._wanted:
            return self
        host, port = split_address(self._wanted, default_port=DEFAULT_PORT)
        try:
            self._server = await asyncio.start_server(
                self._connected, host, port, limit=MAX_HEADER_BYTES
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self._wanted} for metrics: {error.strerror or error}",
                hint="choose another metrics_address, or none",
            ) from error
        self.address = join_address(host, self._server.sockets[0].getsockname()[1])
        log.info("metrics.listening", address=self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            await self._scrapes.close()
            await self._server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= MAX_SCRAPES:
            writer.transport.abort()
            return
        self._open += 1
        self._scrapes.start(self._serve(reader, writer), name="metrics.scrape")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(
                TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                async with asyncio.timeout(REQUEST_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(await self._answer(head))
                    await writer.drain()
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this is no HTTP request\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"only GET is understood\n")
        if words[1].partition(b"?")[0] != PATH:
            return _response("404 Not Found", b"metrics are at /metrics\n")
        try:
            if self._refresh is not None:
                await self._refresh()
            body = generate_latest(self._registry)
        except Exception as error:
            log.error("metrics.failed", exc_info=error)
            return _response("500 Internal Server Error", b"the log says why\n")
        answer = _response("200 OK", body, CONTENT_TYPE_LATEST)
        return answer if words[0] == b"GET" else answer[: -len(body)]


def policy_versions(versions: Mapping[str, int]) -> GaugeMetricFamily:
    """Return versions of policies by scope: "pool", or a project's name after "project/"."""
    found = GaugeMetricFamily(
        "offload_egress_policy_version", "Version of each policy that is held.", labels=["scope"]
    )
    for scope, version in sorted(versions.items()):
        found.add_metric([f"project/{scope}" if scope else "pool"], version)
    return found


def _response(status: str, body: bytes, kind: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body

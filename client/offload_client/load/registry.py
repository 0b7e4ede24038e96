"""A registry on loopback that lives for one load and serves one image from the node.

The engine pulls from it, so that it alone decides what it lacks. Only the content that the image's
own manifests name is served, and only to who knows the random password of this load.
Sources: OCI distribution specification, "Pulling"; what engines ask for was seen on 20.10 to 29.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import secrets
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from offload_client.eventlog import get_logger
from offload_client.load.engine import RegistryLogin
from offload_client.load.fetch import verified_blob
from offload_client.load.image import Descriptor, read_root
from offload_client.load.wire import (
    BadRequestError,
    Request,
    read_request,
    stream_limit,
    write_response,
    write_stream,
)
from offload_core.aio import finish
from offload_core.errors import NotFoundError, OffloadError

if TYPE_CHECKING:
    from types import TracebackType

    from offload_client.load.image import Root
    from offload_client.load.progress import LoadMeter
    from offload_client.load.source import ImageSource

_log = get_logger()

_LOOPBACK = "127.0.0.1"
"""Every engine takes plain HTTP from 127.0.0.0/8; ::1 only from 28 on."""

_CLOSE_SECONDS = 5.0
_CONTENT = re.compile(
    r"/v2/(?P<name>[a-z0-9/-]+)/(?P<kind>manifests|blobs)/(?P<digest>sha256:.{64})"
)
_VERSION_HEADERS = {"Docker-Distribution-Api-Version": "registry/2.0"}


class LoopbackRegistry:
    """An async context manager; the port is chosen by the system.

    Attributes:
        login: what the engine must show.
        contacted: set when anyone connects; tells an engine that cannot reach us from one that
            does not like what it gets.
        served: digests of the blobs that were sent whole or in part.
        failure: what went wrong at the source, None while all is well.
        sending: blobs that are being sent.
    """

    def __init__(self, source: ImageSource, root: Root, meter: LoadMeter) -> None:
        self._source = source
        self._meter = meter
        self._name = f"offload-load-{secrets.token_hex(8)}"
        self._roots: dict[str, Root] = {root.descriptor.digest: root}
        self._blobs: dict[str, Descriptor] = {}
        self._layers: set[str] = set()
        self._manifests: set[str] = set()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.login = RegistryLogin("offload", secrets.token_urlsafe(32))
        self.contacted = asyncio.Event()
        self.served: set[str] = set()
        self.failure: OffloadError | None = None
        self.sending = 0
        self._learn(root)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, _LOOPBACK, 0, limit=stream_limit())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Break off all transfers; called again it does nothing."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await finish(asyncio.wait(set(self._connections)), _CLOSE_SECONDS)

    @property
    def repository(self) -> str:
        """HOST:PORT/NAME for a pull."""
        assert self._server is not None  # noqa: S101 - misuse, not a condition
        port = self._server.sockets[0].getsockname()[1]
        return f"{_LOOPBACK}:{port}/{self._name}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
        self.contacted.set()
        try:
            while (request := await read_request(reader)) is not None:
                await self._answer(request, writer)
                if not request.keep_alive:
                    break
        except BadRequestError:
            # Every engine tries TLS first; only after an answer that begins like HTTP it goes on
            # with plain HTTP.
            with suppress(OSError, TimeoutError):
                await write_response(
                    writer, HTTPStatus.BAD_REQUEST, {"Connection": "close"}, b"plain HTTP only\n"
                )
        except (OSError, TimeoutError) as error:
            _log.debug("load.connection.lost", error=str(error))
        except OffloadError as error:
            # The response has begun: only a broken connection tells the engine.
            self._fail(error)
            writer.transport.abort()
        except asyncio.CancelledError:
            # Ours, at the end of the load; nobody awaits this task's result.
            writer.transport.abort()
        finally:
            writer.close()
            if task is not None:
                self._connections.discard(task)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if not self._knows(request):
            headers = {**_VERSION_HEADERS, "WWW-Authenticate": 'Basic realm="offload"'}
            await write_response(writer, HTTPStatus.UNAUTHORIZED, headers)
            return
        if request.method not in {"GET", "HEAD"}:
            await write_response(writer, HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
            return
        if request.path in {"/v2/", "/v2"}:
            await write_response(writer, HTTPStatus.OK, _VERSION_HEADERS)
            return
        match = _CONTENT.fullmatch(request.path)
        if match is None or match["name"] != self._name:
            # Tags and referrers: engine 29 asks for both and takes a 404.
            await _not_found(request, writer)
        elif match["kind"] == "manifests":
            await self._answer_manifest(request, match["digest"], writer)
        else:
            await self._answer_blob(request, match["digest"], writer)

    def _knows(self, request: Request) -> bool:
        scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
        expected = base64.b64encode(f"{self.login.username}:{self.login.password}".encode())
        return scheme.lower() == "basic" and hmac.compare_digest(
            encoded.strip().encode("latin-1"), expected
        )

    async def _answer_manifest(
        self, request: Request, digest: str, writer: asyncio.StreamWriter
    ) -> None:
        try:
            root = await self._manifest(digest)
        except NotFoundError:
            root = None
        except OffloadError as error:
            self._fail(error)
            await write_response(writer, HTTPStatus.BAD_GATEWAY, {})
            return
        if root is None:
            await _not_found(request, writer)
            return
        headers = {
            **_VERSION_HEADERS,
            "Content-Type": root.descriptor.media_type,
            "Content-Length": str(len(root.raw)),
            "Docker-Content-Digest": digest,
        }
        body = root.raw if request.method == "GET" else b""
        await write_response(writer, HTTPStatus.OK, headers, body)

    async def _manifest(self, digest: str) -> Root | None:
        if (root := self._roots.get(digest)) is not None:
            return root
        if digest not in self._manifests:
            return None
        root = await read_root(self._source, digest)
        self._roots[digest] = root
        self._learn(root)
        return root

    def _learn(self, root: Root) -> None:
        self._manifests.update(child.descriptor.digest for child in root.children)
        if root.manifest is not None:
            self._blobs.update((blob.digest, blob) for blob in root.manifest.blobs)
            self._layers.update(layer.digest for layer in root.manifest.layers)

    async def _answer_blob(
        self, request: Request, digest: str, writer: asyncio.StreamWriter
    ) -> None:
        blob = self._blobs.get(digest)
        if blob is None:
            await _not_found(request, writer)
            return
        headers = {
            **_VERSION_HEADERS,
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "Docker-Content-Digest": digest,
        }
        start = request.range_start(blob.size_bytes)
        headers["Content-Length"] = str(blob.size_bytes - (start or 0))
        if start is not None:
            end = blob.size_bytes - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{blob.size_bytes}"
        status = HTTPStatus.OK if start is None else HTTPStatus.PARTIAL_CONTENT
        if request.method == "HEAD":
            await write_response(writer, status, headers)
            return
        is_layer = digest in self._layers
        self.served.add(digest)
        self._meter.enter("receiving")
        self._meter.expect(blob.size_bytes - (start or 0), layers=int(is_layer))
        pieces = verified_blob(self._source, blob, self._meter, start or 0)
        self.sending += 1
        try:
            async with aclosing(pieces):
                await write_stream(writer, status, headers, pieces)
        finally:
            self.sending -= 1
        if is_layer:
            self._meter.layer_received()

    def _fail(self, error: OffloadError) -> None:
        _log.debug("load.source.failed", reason=error.reason)
        self.failure = self.failure or error


async def _not_found(request: Request, writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"errors": [{"code": "NOT_FOUND", "message": "not found"}]}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if request.method == "HEAD":
        body = b""
    await write_response(writer, HTTPStatus.NOT_FOUND, headers, body)

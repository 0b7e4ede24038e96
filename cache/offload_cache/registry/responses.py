"""Answers of the registry: the distribution specification's errors, and files."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson
import structlog
from aiohttp import web

from offload_core.errors import (
    AccessDeniedError,
    DigestMismatchError,
    NotFoundError,
    OffloadError,
    QuotaExceededError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from aiohttp.abc import AbstractStreamWriter

    from offload_cache.statistics import CacheStatistics
    from offload_cache.tiered import ProjectStore

_log = structlog.get_logger(__name__)

STATISTICS: web.AppKey[CacheStatistics] = web.AppKey("statistics")
_SEND_SECONDS = 3600.0


class RegistryError(Exception):
    """An answer with an error code of the distribution specification, 1.1, "Error Codes"."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


# One text for every unknown repository: whether a capability exists is not to be learnt.
UNKNOWN_NAME = (404, "NAME_UNKNOWN", "there is no such repository")


def unknown_blob() -> RegistryError:
    """Return the answer for a blob that is not to be had."""
    return RegistryError(404, "BLOB_UNKNOWN", "the blob is not here")


def unknown_manifest() -> RegistryError:
    """Return the answer for a manifest that is not to be had."""
    return RegistryError(404, "MANIFEST_UNKNOWN", "the manifest is not here")


def _from_offload(error: OffloadError) -> RegistryError:
    if isinstance(error, DigestMismatchError):
        return RegistryError(400, "DIGEST_INVALID", error.message)
    if isinstance(error, AccessDeniedError):
        return RegistryError(403, "DENIED", error.message)
    if isinstance(error, NotFoundError):
        return RegistryError(404, "BLOB_UNKNOWN", error.message)
    if isinstance(error, QuotaExceededError):
        return RegistryError(507, "DENIED", error.message)
    if isinstance(error, UsageError):
        return RegistryError(400, "MANIFEST_INVALID", error.message)
    return RegistryError(500, "UNKNOWN", error.message)


def _answer(error: RegistryError) -> web.Response:
    body = orjson.dumps({"errors": [{"code": error.code, "message": str(error)}]})
    return web.Response(
        status=error.status, body=body, content_type="application/json", headers=error.headers
    )


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn errors into the specification's JSON and count them."""
    try:
        response = await handler(request)
    except RegistryError as error:
        response = _answer(error)
    except web.HTTPException as error:
        response = _answer(RegistryError(error.status, "UNSUPPORTED", error.reason))
    except OffloadError as error:
        response = _answer(_from_offload(error))
    except TimeoutError:
        response = _answer(RegistryError(408, "UNKNOWN", "the request took too long"))
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary to HTTP
        # Without the path: it holds the capability.
        _log.exception("registry.request.crashed", method=request.method, error=repr(error))
        response = _answer(RegistryError(500, "UNKNOWN", "the registry failed"))
    if response.status >= 400 and response.status != 404:
        request.app[STATISTICS].request_errors += 1
    response.headers.setdefault("Docker-Distribution-Api-Version", "registry/2.0")
    return response


class BlobResponse(web.FileResponse):
    """Sends a verified file with sendfile(2), Range included; the blob is leased meanwhile."""

    def __init__(self, path: Path, digest: str, store: ProjectStore) -> None:
        super().__init__(
            path,
            headers={
                "Content-Type": "application/octet-stream",
                "Docker-Content-Digest": digest,
            },
        )
        self._digest = digest
        self._store = store

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the file; called once by the server."""
        with self._store.lease([self._digest]):
            async with asyncio.timeout(_SEND_SECONDS):
                writer = await super().prepare(request)
        if self.status in {200, 206} and request.method == "GET":
            self._store.statistics.blob_hits += 1
            self._store.statistics.bytes_served += self.content_length or 0
        return writer

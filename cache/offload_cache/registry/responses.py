"""Answers of the registry: the distribution specification's errors, and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import structlog
from aiohttp import web

from offload_core.digest import is_digest
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

    from offload_cache.statistics import CacheStatistics

_log = structlog.get_logger(__name__)

STATISTICS: web.AppKey[CacheStatistics] = web.AppKey("statistics")


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


def not_deleted(allowed: str) -> RegistryError:
    """Return the answer to a delete in a cache; `allowed` are the methods that work there."""
    why = "nothing is deleted from a cache: its scopes decide what it holds"
    return RegistryError(405, "UNSUPPORTED", why, headers={"Allow": allowed})


def digest_of(text: str) -> str:
    """Return a digest from a request.

    Raises:
        RegistryError: it is none, or of an algorithm that is not served.
    """
    if not is_digest(text):
        raise RegistryError(400, "DIGEST_INVALID", "this is no sha256 digest")
    return text


def created(request: web.Request, location: str, digest: str) -> web.Response:
    """Return the answer to a push; `location` is below the repository."""
    info = request.match_info
    return web.Response(
        status=201,
        headers={
            "Location": f"/v2/{info['capability']}/{info['repository']}/{location}",
            "Docker-Content-Digest": digest,
        },
    )


def accepted() -> web.Response:
    """Return the answer to a delete."""
    return web.Response(status=202)


def matches_etag(request: web.Request, digest: str) -> bool:
    """Return whether the client has this content already: RFC 9110, "If-None-Match"."""
    text = request.headers.get("If-None-Match", "")
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in text.split(",")}
    return digest in tags or "*" in tags


def not_modified(digest: str) -> web.Response:
    """Return the answer to a client that has the content already."""
    headers = {"ETag": f'"{digest}"', "Docker-Content-Digest": digest}
    return web.Response(status=304, headers=headers)


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


def error_answer(error: RegistryError) -> web.Response:
    """Return an error in the specification's JSON form."""
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
        response = error_answer(error)
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        response = error_answer(
            RegistryError(error.status, "UNSUPPORTED", error.reason, headers=headers)
        )
    except OffloadError as error:
        response = error_answer(_from_offload(error))
    except TimeoutError:
        response = error_answer(RegistryError(408, "UNKNOWN", "the request took too long"))
    except ConnectionError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary to HTTP
        # Without the path: it holds the capability.
        _log.exception("registry.request.crashed", method=request.method, error=repr(error))
        response = error_answer(RegistryError(500, "UNKNOWN", "the registry failed"))
    if response.status >= 400 and response.status != 404:
        request.app[STATISTICS].request_errors += 1
    return response


async def name_version(_: web.Request, response: web.StreamResponse) -> None:
    """Say in each answer which API this is; clients of docker's first registry look for it."""
    response.headers.setdefault("Docker-Distribution-Api-Version", "registry/2.0")

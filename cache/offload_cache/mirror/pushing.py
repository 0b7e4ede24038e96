"""Pushing an image to an upstream registry: what it has is not sent again.

Source: OCI distribution specification, "Push".
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import structlog

from offload_cache.mirror.connection import read_body
from offload_cache.mirror.errors import AwayError, DeniedError, UnfitError, UpstreamError
from offload_cache.mirror.tokens import Authorizer
from offload_core.digest import sha256_digest
from offload_core.imageindex import INDEX_TYPES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    import aiohttp

    from offload_cache.mirror.connection import Connection
    from offload_cache.mirror.logins import Login

_log = structlog.get_logger(__name__)

_PIECE_BYTES = 1 << 20
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
_AUTH_ATTEMPTS = 2
_ANSWER_SECONDS = 30.0
_BLOB_SECONDS = 3600.0
_MAX_ERROR_BYTES = 64 << 10
_OCTETS = "application/octet-stream"
# Some registries take "*/*" for every type but that of an index.
_MANIFESTS = {"Accept": ", ".join((*INDEX_TYPES, "*/*"))}


class GivenLogin:
    """The login that a caller gave, in memory only."""

    def __init__(self, login: Login | None) -> None:
        self.problem = ""
        self._login = login

    def covers(self, _repository: str) -> bool:
        """Return True: who gives it knows what for."""
        return True

    async def get(self, *, fresh: bool = False) -> Login | None:
        """Return it; what the registry has refused does not get better by `fresh`."""
        del fresh
        return self._login


class RepositoryPush:
    """Pushes into one repository.

    Args:
        connection: to the registry.
        repository: without the host.
        login: of the caller, None for none.
    """

    def __init__(self, connection: Connection, repository: str, login: Login | None) -> None:
        self._connection = connection
        self._repository = repository
        self._authorizer = Authorizer(connection, [GivenLogin(login)])
        self._base = f"{connection.endpoint.base_url}/{repository}"

    async def blob(self, digest: str, size_bytes: int, path: Path, *, mount_from: str = "") -> int:
        """Bring a blob to the registry; return the bytes that were sent, 0 when it was there.

        Args:
            digest: of the blob.
            size_bytes: of the blob.
            path: a verified file with it.
            mount_from: a repository of the same registry that has it; empty for none.

        Raises:
            UpstreamError: it cannot be pushed.
        """
        for attempt in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(_BLOB_SECONDS):
                    return await self._blob(digest, size_bytes, path, mount_from)
            except TimeoutError as error:
                raise AwayError(f"{digest} takes more than {_BLOB_SECONDS:.0f} s") from error
            except AwayError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise
                _log.info("image.push.repeated", digest=digest, cause=str(error))
                await asyncio.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AwayError(f"{digest} cannot be pushed")

    async def _blob(self, digest: str, size_bytes: int, path: Path, mount_from: str) -> int:
        query = ""
        if mount_from and mount_from != self._repository:
            query = f"?mount={digest}&from={mount_from}"
        elif await self._has("blobs", digest):
            return 0
        answer = await self._ask("POST", f"{self._base}/blobs/uploads/{query}", {}, {201, 202})
        if answer.status == 201:
            return 0  # mounted
        location = urljoin(str(answer.url), answer.headers.get("Location", ""))
        if not location.startswith(("https://", "http://")) or (
            location.startswith("http://") and not self._connection.endpoint.http
        ):
            raise UnfitError("the registry wants the upload at a place that is not https")
        url = f"{location}{'&' if '?' in location else '?'}digest={digest}"
        headers = {"Content-Type": _OCTETS, "Content-Length": str(size_bytes)}
        await self._ask("PUT", url, headers, {201, 204}, path=path)
        return size_bytes

    async def manifest(self, reference: str, body: bytes, media_type: str) -> int:
        """Push a manifest or index under a tag or its digest; return the bytes that were sent.

        Raises:
            UpstreamError: it cannot be pushed.
        """
        headers = {"Content-Type": media_type}
        await self._ask("PUT", f"{self._base}/manifests/{reference}", headers, {201}, body=body)
        return len(body)

    async def read_manifest(self, digest: str, max_bytes: int) -> bytes:
        """Return a manifest or index that the repository has, verified.

        Raises:
            UpstreamError: it cannot be read.
        """
        url = f"{self._base}/manifests/{digest}"
        _, body = await self._exchange("GET", url, _MANIFESTS, {200}, max_bytes=max_bytes)
        if sha256_digest(body) != digest:
            raise UnfitError(f"{self._connection.endpoint.address} gives a damaged {digest}")
        return body

    async def has_manifest(self, digest: str) -> bool:
        """Return whether the repository has a manifest.

        Raises:
            UpstreamError: the registry does not answer, or refuses.
        """
        return await self._has("manifests", digest)

    async def _has(self, kind: str, digest: str) -> bool:
        accept = _MANIFESTS if kind == "manifests" else {}
        # A redirect leads to where the blob is.
        known = {200, 301, 302, 303, 307, 308, 404, 405}
        answer = await self._ask("HEAD", f"{self._base}/{kind}/{digest}", accept, known)
        return answer.status < 400

    async def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        fine: set[int],
        *,
        path: Path | None = None,
        body: bytes | None = None,
    ) -> aiohttp.ClientResponse:
        """Return an answer that was read to its end and is of one of these states."""
        answer, _ = await self._exchange(method, url, headers, fine, path=path, body=body)
        return answer

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        fine: set[int],
        *,
        path: Path | None = None,
        body: bytes | None = None,
        max_bytes: int = _MAX_ERROR_BYTES,
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        attempts = _AUTH_ATTEMPTS
        own = self._connection.owns(url)
        authorization = self._authorizer.header(self._repository) if own else ""
        while True:
            sent = {**headers, "Authorization": authorization} if authorization else dict(headers)
            data = _pieces(path) if path is not None else body
            answer = await self._connection.send(
                method, url, sent, data, seconds=_BLOB_SECONDS if path else _ANSWER_SECONDS
            )
            try:
                said = await read_body(answer, max_bytes)
            finally:
                answer.release()
            if answer.status in fine:
                return answer, said
            if answer.status == 401 and own and attempts:
                attempts -= 1
                authorization = await self._authorizer.answer(
                    self._repository,
                    answer.headers.getall("WWW-Authenticate", []),
                    refused=bool(authorization),
                    actions="pull,push",
                )
                continue
            raise self._error(answer.status, said)

    def _error(self, status: int, said: bytes) -> UpstreamError:
        address = self._connection.endpoint.address
        if status in {401, 403}:
            return DeniedError(f"{address} answers {status}")
        if status == 429 or status >= 500:
            return AwayError(f"{address} answers {status}")
        text = "".join(char for char in said[:200].decode("utf-8", "replace") if char.isprintable())
        return UnfitError(f"{address} answers {status}: {text}")


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while data := await asyncio.to_thread(os.pread, file, _PIECE_BYTES, offset):
            yield data
            offset += len(data)
    finally:
        os.close(file)

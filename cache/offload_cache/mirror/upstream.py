"""One upstream registry: its own address and the mirrors configured for it, tried in order."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog

from offload_cache.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    OCI_MANIFEST,
)
from offload_cache.mirror.connection import Connection, Endpoint, read_body
from offload_cache.mirror.errors import AwayError, DeniedError, MissingError, UpstreamError
from offload_cache.mirror.logins import Logins
from offload_cache.mirror.tokens import Authorizer
from offload_core.digest import is_digest, sha256_digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import aiohttp

    from offload_cache.mirror.logins import LoginSource

T = TypeVar("T")
_log = structlog.get_logger(__name__)

DOCKER_HUB = "docker.io"
_DOCKER_HUB_ADDRESS = "registry-1.docker.io"
_DOCKER_HUB_LOGIN = "https://index.docker.io/v1/"
_ACCEPT = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))
_AUTH_ATTEMPTS = 2
_PAUSES_SECONDS = (0.2, 0.6)
_AWAY_SECONDS = 15.0
_SHORT_RETRY_SECONDS = 2.0
_LONGEST_RETRY_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """A registry whose images are cached.

    Attributes:
        host: as image names begin, for example "docker.io".
        endpoints: mirrors first, at last the registry itself, each with the pool's logins there.
    """

    host: str
    endpoints: Sequence[tuple[Endpoint, Sequence[LoginSource]]]


def origin_address(host: str) -> str:
    """Return where the registry of a host name is."""
    return _DOCKER_HUB_ADDRESS if host == DOCKER_HUB else host


def helper_name(address: str) -> str:
    """Return the name by which credential helpers know a registry."""
    return _DOCKER_HUB_LOGIN if address == _DOCKER_HUB_ADDRESS else address


class EndpointClient:
    """Authorised requests to one endpoint.

    Args:
        host: as image names begin.
        connection: to the endpoint.
        logins: of the pool; the first that covers a repository is used for it.
    """

    def __init__(self, host: str, connection: Connection, logins: Sequence[LoginSource]) -> None:
        address = connection.endpoint.address
        self._connection = connection
        self._is_origin = address == origin_address(host)
        self._host = host
        known_as = helper_name(address)
        self._authorizer = Authorizer(connection, [Logins(known_as, login) for login in logins])
        self._away_until = 0.0
        self._cause = ""

    async def request(
        self, method: str, repository: str, path: str, headers: dict[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """Return an answer of status 200 or 206; the caller releases it.

        Raises:
            MissingError: the registry has no such thing.
            DeniedError: the pool may not read it.
            AwayError: the registry does not answer, now or a moment ago.
        """
        if time.monotonic() < self._away_until:
            raise AwayError(self._cause)
        url = f"{self._connection.endpoint.base_url}/{repository}/{path}"
        if not self._is_origin:
            url += f"?ns={self._host}"  # says to a mirror of many registries which one is meant
        try:
            return await self._authorised(method, url, repository, headers or {})
        except AwayError as error:
            if time.monotonic() >= self._away_until:
                self._pause(_AWAY_SECONDS, str(error))
            raise

    def _pause(self, seconds: float, cause: str) -> None:
        self._away_until = time.monotonic() + seconds
        self._cause = cause
        _log.warning(
            "base_images.registry.away",
            registry=self._connection.endpoint.address,
            cause=cause,
            pause_seconds=round(seconds, 1),
        )

    async def _authorised(
        self, method: str, url: str, repository: str, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        authorization = self._authorizer.header(repository)
        attempts, pauses = _AUTH_ATTEMPTS, iter(_PAUSES_SECONDS)
        while True:
            sent = {**headers, "Authorization": authorization} if authorization else headers
            answer = await self._connection.open(method, url, sent)
            status = answer.status
            if status in {200, 206}:
                return answer
            answer.release()
            # Only the registry may ask for its login, and say where it is to be sent.
            if status == 401 and attempts and self._connection.owns(str(answer.url)):
                attempts -= 1
                authorization = await self._authorizer.answer(
                    repository,
                    answer.headers.getall("WWW-Authenticate", []),
                    refused=bool(authorization),
                )
                continue
            pause = next(pauses, None)
            if status == 429:
                asked = _retry_after(answer)
                if pause is None or asked > _SHORT_RETRY_SECONDS:
                    cause = f"{self._connection.endpoint.address} refuses so many requests (429)"
                    self._pause(max(asked, _AWAY_SECONDS), cause)
                    raise AwayError(cause)
                pause = max(asked, pause)
            elif status < 500 or pause is None:
                raise _error(self._connection.endpoint.address, status)
            await asyncio.sleep(pause)


class Upstream:
    """Reads a registry for the pool. Used from one event loop.

    Args:
        source: the registry, its mirrors and logins.
        session: for HTTP; its owner closes it.

    Raises:
        ConfigError: a certificate file cannot be read.
    """

    def __init__(self, source: RegistrySource, session: aiohttp.ClientSession) -> None:
        self.host = source.host
        self._clients = [
            EndpointClient(source.host, Connection(endpoint, session), logins)
            for endpoint, logins in source.endpoints
        ]

    async def first(self, ask: Callable[[EndpointClient], Awaitable[T]]) -> T:
        """Ask the endpoints in order until one gives what is wanted.

        Raises:
            UpstreamError: of the last endpoint, which is the registry itself.
        """
        last: UpstreamError = MissingError(f"no endpoint of {self.host} is configured")
        for client in self._clients:
            try:
                return await ask(client)
            except UpstreamError as error:
                last = error
        raise last

    async def find_manifest(self, repository: str, reference: str) -> str:
        """Return the digest that a tag or digest has now.

        Raises:
            UpstreamError: as `EndpointClient.request` says.
        """

        async def ask(client: EndpointClient) -> str:
            path, headers = f"manifests/{reference}", {"Accept": _ACCEPT}
            try:
                answer = await client.request("HEAD", repository, path, headers)
            except _HeadRefusedError:
                pass
            else:
                answer.release()
                digest = answer.headers.get("Docker-Content-Digest", "")
                if is_digest(digest):
                    return digest
            # The specification asks for neither HEAD with this header nor for its name.
            return sha256_digest(await _body(client, repository, path))

        return await self.first(ask)

    async def read_manifest(self, repository: str, digest: str) -> bytes:
        """Return a manifest, not verified.

        Raises:
            UpstreamError: as `EndpointClient.request` says.
        """
        return await self.first(lambda client: _body(client, repository, f"manifests/{digest}"))

    async def find_blob(self, repository: str, digest: str) -> int:
        """Return the bytes of a blob; 0 when the registry does not say.

        Raises:
            UpstreamError: as `EndpointClient.request` says.
        """

        async def ask(client: EndpointClient) -> int:
            answer = await client.request("HEAD", repository, f"blobs/{digest}")
            answer.release()
            return int(answer.headers.get("Content-Length", "0"))

        return await self.first(ask)


async def _body(client: EndpointClient, repository: str, path: str) -> bytes:
    answer = await client.request("GET", repository, path, {"Accept": _ACCEPT})
    try:
        return await read_body(answer, MAX_MANIFEST_BYTES)
    finally:
        answer.release()


class _HeadRefusedError(MissingError):
    """The registry knows no HEAD."""


def _error(address: str, status: int) -> UpstreamError:
    if status in {401, 403}:
        return DeniedError(f"{address} answers {status}")
    if status >= 500:
        return AwayError(f"{address} answers {status}")
    if status == 405:
        return _HeadRefusedError(f"{address} answers 405")
    return MissingError(f"{address} answers {status}")


def _retry_after(answer: aiohttp.ClientResponse) -> float:
    """Return what a 429 asks for; a date, which is rare, counts as a long time."""
    text = answer.headers.get("Retry-After", "")
    if text.isascii() and text.isdigit():
        return min(float(text), _LONGEST_RETRY_SECONDS)
    return _LONGEST_RETRY_SECONDS if text else _SHORT_RETRY_SECONDS

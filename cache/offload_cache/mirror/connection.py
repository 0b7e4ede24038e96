"""HTTP to one upstream registry: TLS, proxies, redirects, patience."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson
from yarl import URL

from offload_cache.mirror.errors import AwayError
from offload_cache.mirror.judging import Guard
from offload_core import VERSION
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from offload_cache.mirror.judging import Judge

CONNECT_SECONDS = 5.0
HEADER_SECONDS = 15.0
READ_SECONDS = 30.0
_MAX_REDIRECTS = 5
_MAX_JSON_BYTES = 1 << 20
_REDIRECTS = {301, 302, 303, 307, 308}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a registry is.

    Attributes:
        address: HOST[:PORT], with a path for registries that have their API below one.
        http: speak plain HTTP.
        insecure: accept any certificate.
        ca_files: certificates of its authorities, beside the system's.
    """

    address: str
    http: bool = False
    insecure: bool = False
    ca_files: Sequence[Path] = ()

    @property
    def base_url(self) -> str:
        """What URLs of the distribution API begin with, without a slash at the end."""
        host, slash, path = self.address.partition("/")
        return f"{'http' if self.http else 'https'}://{host}/v2{slash}{path.rstrip('/')}"


class Connection:
    """Requests to one endpoint, and to where it redirects.

    Args:
        endpoint: the registry.
        session: shared by all connections of the node; its owner closes it.

    Raises:
        ConfigError: a certificate file cannot be read.
    """

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        self.endpoint = endpoint
        self._session = session
        self._tls = _tls_context(endpoint)
        self._origin = _origin(endpoint.base_url)

    def may_send_login(self, url: str) -> bool:
        """Whether a login may go to a URL: over TLS, or where plain HTTP is configured."""
        return url.startswith("https://") or self.endpoint.http

    def owns(self, url: str) -> bool:
        """Whether a URL is one of the registry itself, and not where it redirects to."""
        return _origin(url) == self._origin

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: AsyncIterator[bytes] | bytes | None,
        *,
        seconds: float,
    ) -> aiohttp.ClientResponse:
        """Send a request with a body, follow no redirect, and return the answer to be read.

        The caller releases it.

        Raises:
            AwayError: there is no answer in `seconds`.
            RefusedError: the session's judge refuses it.
        """
        return await self._send(method, url, headers=headers, data=data, seconds=seconds)

    async def open(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send a request, follow redirects, and return the answer with its body still to be read.

        The caller releases it. The Authorization header stays with the registry's own origin.

        Raises:
            AwayError: there is no answer, or the redirects make no sense.
            RefusedError: the session's judge refuses it, or a redirect.
        """
        sent = dict(headers)
        for _ in range(_MAX_REDIRECTS + 1):
            if _origin(url) != self._origin:
                sent.pop("Authorization", None)
            answer = await self._send(method, url, headers=sent)
            if answer.status not in _REDIRECTS:
                return answer
            answer.release()
            target = urljoin(url, answer.headers.get("Location", ""))
            scheme = urlsplit(target).scheme
            if scheme not in {"http", "https"} or (url.startswith("https:") and scheme == "http"):
                raise AwayError(f"{self.endpoint.address} redirects to something that is not https")
            url = target
        raise AwayError(f"{self.endpoint.address} redirects in circles")

    async def json(
        self,
        method: str,
        url: str,
        *,
        query: Sequence[tuple[str, str]] | None = None,
        form: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON object that a service answers; `{}` when it is none.

        Raises:
            AwayError: there is no answer.
            RefusedError: the session's judge refuses it.
        """
        answer = await self._send(method, url, headers=headers or {}, query=query, form=form)
        try:
            body = await read_body(answer, _MAX_JSON_BYTES)
        finally:
            answer.release()
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = {}
        return answer.status, document if isinstance(document, dict) else {}

    async def _send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        query: Sequence[tuple[str, str]] | None = None,
        form: Mapping[str, str] | None = None,
        data: AsyncIterator[bytes] | bytes | None = None,
        seconds: float | None = None,
    ) -> aiohttp.ClientResponse:
        bound = HEADER_SECONDS if seconds is None else seconds
        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=max(READ_SECONDS, bound)
        )
        try:
            async with asyncio.timeout(bound):
                return await self._session.request(
                    method,
                    # A signed URL must arrive as it is written.
                    URL(url, encoded=True) if query is None else URL(url).extend_query(query),
                    headers={"Accept-Encoding": "identity", **headers},
                    data=form if data is None else data,
                    timeout=patience,
                    allow_redirects=False,
                    ssl=self._tls,
                    proxy=_proxy_for(url),
                )
        except TimeoutError as error:
            raise AwayError(f"{urlsplit(url).netloc} does not answer in time") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise AwayError(f"{urlsplit(url).netloc} is not reachable: {_reason(error)}") from error


async def read_body(answer: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the whole body of an answer.

    Raises:
        AwayError: it breaks off, is slow, or is larger than `max_bytes`.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > max_bytes:
                    raise AwayError(f"{answer.url.host} sends more than {max_bytes} bytes")
    except TimeoutError as error:
        raise AwayError(f"{answer.url.host} is too slow") from error
    except aiohttp.ClientError as error:
        raise AwayError(f"{answer.url.host} broke off: {_reason(error)}") from error
    return bytes(body)


def new_session(judge: Judge | None = None) -> aiohttp.ClientSession:
    """Return a session for upstream registries; its caller closes it.

    Args:
        judge: decides what its connections may reach, which then raise RefusedError; None for
            everything.
    """
    guard = Guard(judge) if judge is not None else None
    return aiohttp.ClientSession(
        # Who pulls bounds itself. With a bound here a question would wait for layers on their way,
        # and that looks like a registry that does not answer.
        connector=aiohttp.TCPConnector(limit=0, socket_factory=guard.socket if guard else None),
        middlewares=(guard.request,) if guard else (),
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
        ),
        headers={"User-Agent": f"offload-build/{VERSION}"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=1 << 20,
    )


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _proxy_for(url: str) -> str | None:
    """Return the proxy of the environment, as BuildKit's own pulls use it."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.strerror or type(error.os_error).__name__
    return type(error).__name__


def _tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in endpoint.ca_files:
        try:
            context.load_verify_locations(path)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificates for registry {endpoint.address} in {path} cannot be read"
            ) from error
    if endpoint.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context

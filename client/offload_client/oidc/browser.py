"""Login in a browser: authorization code with PKCE and a redirect to this machine.

Sources: RFC 6749 (section 4.1), RFC 7636 (PKCE), RFC 8252 (native applications), RFC 9207 (iss).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode, urlsplit

from offload_client.bytepipe import in_thread
from offload_client.oidc.webcalls import provider_error
from offload_core.errors import AuthenticationError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.oidc.provider import Provider, ProviderTokens

WAIT_SECONDS = 300.0
REQUEST_SECONDS = 5.0
MAX_LINE_BYTES = 16 << 10
PATH = "/callback"

_PAGE = (
    "HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nConnection: close\r\n"
    "Cache-Control: no-store\r\nContent-Length: {size}\r\n\r\n{text}"
)


@dataclass
class _Attempt:
    """One login: what the answer must repeat, and where it arrives."""

    issuer: str
    state: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(64))
    code: asyncio.Future[str] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def challenge(self) -> str:
        """Return the S256 challenge (RFC 7636, section 4.2)."""
        digest = hashlib.sha256(self.verifier.encode("ascii")).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request of a browser."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = (await reader.readline()).decode("latin-1")
                writer.write(self._answer(line).encode())
                await writer.drain()
        except (TimeoutError, ValueError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, line: str) -> str:
        method, _, rest = line.partition(" ")
        target = urlsplit(rest.partition(" ")[0])
        if method != "GET" or target.path != PATH:
            return _page("404 Not Found", "Nothing is here.")
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        # Not ours: somebody else's page may have sent the browser here. We go on waiting.
        if not hmac.compare_digest(query.get("state", "").encode(), self.state.encode()):
            return _page("400 Bad Request", "This is not the answer to the login that runs here.")
        if self.code.done():
            return _page("200 OK", "This login is over. You can close this window.")
        if query.get("iss", self.issuer) != self.issuer:
            self.code.set_exception(AuthenticationError("another identity provider has answered"))
            return _page("400 Bad Request", "Another identity provider has answered.")
        if code := query.get("code"):
            self.code.set_result(code)
            return _page("200 OK", "You are logged in. You can close this window.")
        text = query.get("error_description") or query.get("error") or "no code"
        shown = "".join(char if char.isprintable() else " " for char in text[:300])
        self.code.set_exception(
            AuthenticationError(f"the identity provider refuses the login: {shown}")
        )
        return _page("200 OK", "The login was refused. You can close this window.")


async def browser_login(
    provider: Provider, show: Callable[[str], None], open_page: Callable[[str], bool]
) -> ProviderTokens:
    """Send the person's browser to the provider and wait for its answer.

    Args:
        provider: with an authorization endpoint.
        show: prints a line for people.
        open_page: opens a page in a browser, or returns False.

    Raises:
        AuthenticationError: refused, or no answer within five minutes.
        ConfigError: no port of this machine can be listened on.
    """
    attempt = _Attempt(provider.issuer)
    try:
        server = await asyncio.start_server(attempt.serve, "127.0.0.1", 0, limit=MAX_LINE_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot listen on 127.0.0.1: {error.strerror}") from error
    async with server:
        redirect = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{PATH}"
        query = {
            "response_type": "code",
            "client_id": provider.client_id,
            "redirect_uri": redirect,
            "scope": " ".join(provider.scopes),
            "state": attempt.state,
            "nonce": attempt.nonce,
            "code_challenge": attempt.challenge(),
            "code_challenge_method": "S256",
        }
        endpoint = provider.authorization_endpoint
        url = f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}"
        if not await in_thread(lambda: open_page(url), name="browser"):
            show("Open this page in a browser on this machine:")
        show(url)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                code = await attempt.code
        except TimeoutError as error:
            raise AuthenticationError(
                f"the browser has not come back within {WAIT_SECONDS / 60:.0f} minutes",
                hint="run the login again, or use --device",
            ) from error
    answer = await provider.ask_tokens(
        {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect,
            "code_verifier": attempt.verifier,
        }
    )
    if not answer.ok:
        raise provider_error(answer, provider.shown)
    return provider.tokens(answer, nonce=attempt.nonce)


def _page(status: str, text: str) -> str:
    body = f"<!doctype html><title>offload</title><p>{text}</p>\n"
    return _PAGE.format(status=status, size=len(body.encode()), text=body)

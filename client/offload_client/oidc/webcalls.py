"""Small JSON calls to identity providers: bounded, never redirected, over https."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_client.bytepipe import in_thread
from offload_core.errors import AuthenticationError
from offload_core.weburls import check_web_url, is_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping

CALL_SECONDS = 15.0
MAX_ANSWER_BYTES = 256 << 10


@dataclass(frozen=True)
class WebAnswer:
    """An answer with its JSON object; empty when it has none."""

    status: int
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the call did what was asked."""
        return self.status == 200

    def text(self, name: str) -> str:
        """Return a text of the object; empty when there is none."""
        value = self.body.get(name)
        return value if isinstance(value, str) else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """Follow none: secrets go to whom they are for."""


async def call_json(
    url: str,
    *,
    who: str,
    environment: Mapping[str, str],
    form: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    wants_object: bool = True,
) -> WebAnswer:
    """Call a URL; with a form it is a POST.

    Args:
        url: https, or http on this machine.
        who: is called, for sentences.
        environment: of the command; HTTPS_PROXY and NO_PROXY count.
        form: fields.
        headers: further ones.
        wants_object: a good answer has a JSON object.

    Raises:
        AuthenticationError: no answer, or none that can be read.
        ConfigError: the URL cannot be called safely.
    """
    check_web_url(url)
    data = urllib.parse.urlencode(form).encode() if form is not None else None
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        url, data=data, headers={"Accept": "application/json", **(headers or {})}
    )
    try:
        async with asyncio.timeout(CALL_SECONDS + 1):
            return await in_thread(
                lambda: _call(request, environment, lenient=not wants_object),
                name="identity-provider",
            )
    except TimeoutError as error:
        raise AuthenticationError(f"{who} does not answer within {CALL_SECONDS:.0f} s") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
        raise AuthenticationError(
            f"{who} cannot be asked: {reason or type(error).__name__}"
        ) from error


def _call(
    request: urllib.request.Request, environment: Mapping[str, str], *, lenient: bool
) -> WebAnswer:
    proxy = urllib.request.ProxyHandler(_proxies(request.full_url, environment))
    opener = urllib.request.build_opener(_NoRedirect(), proxy)
    try:
        with opener.open(request, timeout=CALL_SECONDS) as response:
            return WebAnswer(
                response.status, _object(response.read(MAX_ANSWER_BYTES + 1), lenient=lenient)
            )
    except urllib.error.HTTPError as error:
        with error:
            return WebAnswer(error.code, _object(error.read(MAX_ANSWER_BYTES + 1), lenient=True))


def _proxies(url: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the proxy of a command, not of this process: the helper serves many commands."""
    parts = urllib.parse.urlsplit(url)
    name = f"{parts.scheme}_proxy"
    proxy = environment.get(name) or environment.get(name.upper()) or ""
    spared = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if not proxy or is_loopback(url) or _is_spared(parts.hostname or "", spared):
        return {}
    return {parts.scheme: proxy}


def _is_spared(host: str, spared: str) -> bool:
    """Return whether NO_PROXY names a host: itself, a domain above it, or all."""
    names = [name.strip().lower().lstrip(".") for name in spared.split(",")]
    return any(name == "*" or (name and f".{host}".endswith(f".{name}")) for name in names)


def _object(data: bytes, *, lenient: bool = False) -> dict[str, Any]:
    try:
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError("the answer is too long")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("the answer is no JSON object")
    except (ValueError, RecursionError) as error:
        if lenient:
            return {}
        raise ValueError(str(error)) from error
    return value


def provider_error(answer: WebAnswer, who: str) -> AuthenticationError:
    """Return what a provider says went wrong, printable and bounded."""
    text = answer.text("error_description") or answer.text("error") or f"status {answer.status}"
    shown = "".join(char if char.isprintable() else " " for char in text[:300])
    return AuthenticationError(f"{who} refuses the login: {shown}")

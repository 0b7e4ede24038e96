"""JSON documents of issuers: bounded in time and size, never from where a redirect points."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import aiohttp

from offload_builder.gateway.oidc.strictjson import StrictJsonError, parse_object
from offload_core.weburls import is_loopback

if TYPE_CHECKING:
    from pathlib import Path

FETCH_SECONDS = 5.0
MAX_DOCUMENT_BYTES = 256 << 10
_PIECE = 16 << 10


class IssuerUnreachableError(Exception):
    """An issuer gives no usable document; the message continues "the issuer ..."."""


async def fetch_json(url: str, *, ca_file: Path | None) -> dict[str, Any]:
    """Return the JSON object at a URL.

    Args:
        url: checked by `offload_core.weburls.check_web_url`.
        ca_file: certificates to trust instead of the system's.

    Raises:
        IssuerUnreachableError: no answer within 5 s, no success, more than 256 KiB, or no JSON.
    """
    try:
        async with asyncio.timeout(FETCH_SECONDS):
            data = await _fetch(url, ca_file)
        return parse_object(data, "the document")
    except TimeoutError as error:
        raise IssuerUnreachableError(f"does not answer within {FETCH_SECONDS:.0f} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # Not the error's own words: they may repeat what a stranger sent.
        kind = str(error) if isinstance(error, StrictJsonError) else type(error).__name__
        raise IssuerUnreachableError(f"gives no usable answer ({kind})") from error


async def _fetch(url: str, ca_file: Path | None) -> bytes:
    context: ssl.SSLContext | bool = True
    if ca_file is not None:
        context = ssl.create_default_context(cafile=str(ca_file))
    # A proxy of the environment is for what lies outside of this machine.
    async with (
        aiohttp.ClientSession(
            trust_env=not is_loopback(url),
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(ssl=context, force_close=True),
        ) as session,
        session.get(
            url,
            allow_redirects=False,
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        ) as response,
    ):
        if response.status != 200:
            raise IssuerUnreachableError(f"answers with the status {response.status}")
        data = bytearray()
        async for piece in response.content.iter_chunked(_PIECE):
            data += piece
            if len(data) > MAX_DOCUMENT_BYTES:
                raise IssuerUnreachableError(
                    f"sends a document of more than {MAX_DOCUMENT_BYTES >> 10} KiB"
                )
        return bytes(data)

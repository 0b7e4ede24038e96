"""A Dockerfile that `-f` names by URL."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from offload_core.errors import ContextError
from offload_core.units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.request import OpenerDirector

MAX_BYTES = 2 << 20
"""As in buildx."""
TIMEOUT_SECONDS = 30.0


def fetch_dockerfile(url: str, environment: Mapping[str, str]) -> bytes:
    """Download a Dockerfile; for a worker thread.

    Args:
        url: http or https.
        environment: http_proxy, https_proxy, no_proxy and SSL_CERT_FILE count.

    Raises:
        ContextError: it cannot be had, or is larger than 2 MiB.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError

    shown = url.replace(f"{urlsplit(url).netloc.rpartition('@')[0]}@", "")
    try:
        with _opener(url, environment).open(url, timeout=TIMEOUT_SECONDS) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()
        raise ContextError(f"failed to read dockerfile: cannot get {shown}: {error}") from error
    if len(data) > MAX_BYTES:
        raise ContextError(
            f"Dockerfile {shown} is bigger than the allowed maximum of {format_size(MAX_BYTES)}"
        )
    return data


def _opener(url: str, environment: Mapping[str, str]) -> OpenerDirector:
    import ssl
    from urllib.request import (  # type: ignore[attr-defined]
        HTTPSHandler,
        ProxyHandler,
        build_opener,
        proxy_bypass_environment,
    )

    def variable(name: str) -> str:
        return environment.get(name, "") or environment.get(name.upper(), "")

    proxies = {
        scheme: proxy for scheme in ("http", "https") if (proxy := variable(f"{scheme}_proxy"))
    }
    host = urlsplit(url).netloc.rpartition("@")[2]
    if proxy_bypass_environment(host, {"no": variable("no_proxy")}):
        proxies = {}
    context = ssl.create_default_context(cafile=environment.get("SSL_CERT_FILE") or None)
    return build_opener(ProxyHandler(proxies), HTTPSHandler(context=context))

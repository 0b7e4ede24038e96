"""URLs of identity providers: https, or http on this machine only."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from offload_core.errors import ConfigError

MAX_URL = 2000


def is_loopback(url: str) -> bool:
    """Return whether a URL leads to this machine without asking anybody for an address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_web_url(url: str) -> str:
    """Return a URL whose answers can be believed.

    Raises:
        ConfigError: it is no URL, has a user, a query or a fragment, or goes over the network in
            the clear.
    """
    shown = f'"{url[:100]}"'
    if len(url) > MAX_URL or not url.isprintable() or " " in url:
        raise ConfigError(f"{shown} is not a URL")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{shown} is not a URL") from error
    if not host or parts.scheme not in ("https", "http"):
        raise ConfigError(f"{shown} is not a URL that begins with https://")
    if parts.username is not None or parts.fragment:
        raise ConfigError(f"{shown} must have neither a user nor a fragment")
    if parts.scheme == "http" and not is_loopback(url):
        raise ConfigError(f"{shown} must begin with https://; http is for this machine only")
    return url

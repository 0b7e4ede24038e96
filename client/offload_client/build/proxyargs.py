"""Proxies of the user's docker configuration, which every build gets as build arguments.

Source: docker CLI documentation, "Use a proxy server with the Docker CLI"; docker/buildx
store/storeutil (GetProxyConfig) and build/opt.go. BuildKit hands these arguments to RUN steps as
variables, in upper and lower case, and keeps them out of cache keys and of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offload_client.dockerconfig import read_docker_config
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = "default"
"""The entry for engines that have none of their own."""
NAMES = {
    "httpProxy": "HTTP_PROXY",
    "httpsProxy": "HTTPS_PROXY",
    "noProxy": "NO_PROXY",
    "ftpProxy": "FTP_PROXY",
}
"""Build argument by key. Docker's `allProxy` is for containers only: buildx leaves it out too."""


def with_proxies(
    build_args: Mapping[str, str], environment: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Return build arguments with the proxies; one that is there already stays as it is.

    Args:
        build_args: values of --build-arg.
        environment: says where docker's configuration is, and which engine is the user's.

    Returns:
        The arguments, and what to warn of: as docker, a build goes on without a configuration
        that cannot be read. Empty for nothing.
    """
    try:
        proxies = read_docker_config(environment).get("proxies")
        if not proxies:
            return dict(build_args), ""
        entry = _entry(proxies, environment)
    except OffloadError as error:
        return dict(
            build_args
        ), f"{error.message}; the build has no proxies and no logins from there"
    if not isinstance(entry, dict):
        return dict(build_args), "the proxies in docker's config.json cannot be read"
    found = {name: entry.get(key) for key, name in NAMES.items()}
    given = {name: value for name, value in found.items() if value and isinstance(value, str)}
    return {**given, **build_args}, ""


def _entry(proxies: Any, environment: Mapping[str, str]) -> Any:
    """Return the entry of the user's engine, else the one for all."""
    if not isinstance(proxies, dict) or set(proxies) <= {DEFAULT}:
        return proxies.get(DEFAULT, {}) if isinstance(proxies, dict) else None
    from offload_client.load.endpoint import resolve_endpoint

    return proxies.get(resolve_endpoint(environment).host, proxies.get(DEFAULT, {}))

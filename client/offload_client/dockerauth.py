"""Registry logins that the user has made with `docker login`.

Sources: docker CLI documentation, "docker login" (credential stores, credential helpers), its
cli/config/configfile and cli/config/credentials for how keys are matched and what comes first, and
containers-auth.json(5) for entries of a part of a registry. Helpers: `credentialhelper`.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from offload_client.credentialhelper import ask_helper
from offload_client.dockerconfig import read_docker_config
from offload_client.eventlog import get_logger
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = get_logger()

_HUB_KEY = "https://index.docker.io/v1/"
_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HUB_KEYS = (_HUB_KEY, "index.docker.io", "docker.io", "registry-1.docker.io")


class Credentials(NamedTuple):
    """A login; the user name is empty when `secret` is an identity token."""

    username: str
    secret: str

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, secret='***')"


def credentials_for(
    host: str, environment: Mapping[str, str], repository: str = ""
) -> Credentials | None:
    """Return the user's login at a registry, None when there is none.

    Looked for in this order: an entry of the variable `DOCKER_AUTH_CONFIG` or of `auths` for a
    part of the registry that has the repository, the variable's entry for the registry, its entry
    in `credHelpers`, the store in `credsStore`, the entry in `auths`. A helper that is missing,
    fails or hangs is logged and skipped: a public image needs no login. Blocking: call it in a
    thread.

    Args:
        host: registry host with its port, "registry-1.docker.io" for Docker Hub.
        environment: `DOCKER_CONFIG`, `HOME`, and for the helpers `PATH` and the rest.
        repository: that is to be read or written there; empty when it is not known.

    Raises:
        ConfigError: the configuration file cannot be read or has a wrong form.
    """
    keys = _keys(host)
    given = _environment_auths(environment)
    config = read_docker_config(environment)
    auths = _table(config, "auths")
    for table in (given, auths):
        if login := _from_parts(table, keys, repository):
            return login
    if login := _from_auths(given, keys):
        return login
    helpers = _table(config, "credHelpers")
    chosen = next((name for key in keys if isinstance(name := helpers.get(key), str)), None)
    if chosen is None and isinstance(store := config.get("credsStore"), str) and store:
        chosen = store
    if chosen is not None and (found := ask_helper(chosen, keys[0], environment)):
        return Credentials(*found)
    return _from_auths(auths, keys)


def _keys(host: str) -> tuple[str, ...]:
    return _HUB_KEYS if host in _HUB_HOSTS else (host,)


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f'"{key}" in docker\'s config.json is not an object')
    return value


def _environment_auths(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the variable's entries; as docker does, none when it cannot be read."""
    text = environment.get("DOCKER_AUTH_CONFIG")
    if not text:
        return {}
    try:
        content = json.loads(text)
        auths = content["auths"]
    except (ValueError, KeyError, TypeError):
        auths = None
    if not isinstance(auths, dict):
        _log.warning("docker_auth_config.ignored", cause='it is not JSON with an object "auths"')
        return {}
    return auths


def _from_auths(auths: Mapping[str, Any], keys: tuple[str, ...]) -> Credentials | None:
    entry = next((auths[key] for key in keys if key in auths), None)
    if entry is None:
        # Old files have keys such as "https://host/v1/"; docker ignores any path.
        entry = next((auths[key] for key in auths if _hostname(key) in keys), None)
    return _read_entry(entry) if isinstance(entry, dict) else None


def _from_parts(
    auths: Mapping[str, Any], keys: tuple[str, ...], repository: str
) -> Credentials | None:
    """Return the login of the longest key HOST/PATH that the repository lies in."""
    parts = repository.split("/") if repository else []
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        for key in keys:
            entry = auths.get(f"{_hostname(key)}/{path}")
            if isinstance(entry, dict) and (login := _read_entry(entry)):
                return login
    return None


def _hostname(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").split("/", 1)[0]


def _read_entry(entry: Mapping[str, Any]) -> Credentials | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials("", token)
    encoded = entry.get("auth")
    if isinstance(encoded, str) and encoded:
        try:
            text = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ConfigError(
                'an "auth" entry in docker\'s config.json is damaged; use docker login again'
            ) from None
        username, colon, secret = text.partition(":")
        if colon and username:
            return Credentials(username, secret.rstrip("\0"))
    plain_user, plain_secret = entry.get("username"), entry.get("password")
    if isinstance(plain_user, str) and isinstance(plain_secret, str) and plain_user:
        return Credentials(plain_user, plain_secret) if plain_secret else None
    return None

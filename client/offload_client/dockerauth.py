"""Registry logins that the user has made with `docker login`.

Sources: docker CLI documentation, "docker login" (credential stores, credential helpers), and the
protocol of the docker-credential-helpers project: the server name on stdin of
`docker-credential-NAME get`, a JSON object with Username and Secret on stdout.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

from offload_client.dockerconfig import read_docker_config
from offload_client.eventlog import get_logger
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = get_logger()

_HUB_KEY = "https://index.docker.io/v1/"
_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HUB_KEYS = (_HUB_KEY, "index.docker.io", "docker.io", "registry-1.docker.io")
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_USER = "<token>"  # noqa: S105 - the user name with which helpers mark an identity token
_HELPER_SECONDS = 30.0


class Credentials(NamedTuple):
    """A login; the user name is empty when `secret` is an identity token."""

    username: str
    secret: str

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, secret='***')"


def credentials_for(host: str, environment: Mapping[str, str]) -> Credentials | None:
    """Return the user's login at a registry, None when there is none.

    Looked for in this order: the variable `DOCKER_AUTH_CONFIG`, the registry's entry in
    `credHelpers`, the store in `credsStore`, the entry in `auths`. A helper that is missing, fails
    or takes more than 30 seconds is logged and skipped: a public image needs no login. Blocking:
    call it in a thread.

    Args:
        host: registry host with its port, "registry-1.docker.io" for Docker Hub.
        environment: `DOCKER_CONFIG`, `HOME`, and for the helpers `PATH` and the rest.

    Raises:
        ConfigError: the configuration file cannot be read or has a wrong form.
    """
    keys = _keys(host)
    if login := _from_auths(_environment_auths(environment), keys):
        return login
    config = read_docker_config(environment)
    helpers = _table(config, "credHelpers")
    chosen = next((name for key in keys if isinstance(name := helpers.get(key), str)), None)
    if chosen is None and isinstance(store := config.get("credsStore"), str) and store:
        chosen = store
    if chosen is not None and (login := _ask_helper(chosen, keys[0], environment)):
        return login
    return _from_auths(_table(config, "auths"), keys)


def _keys(host: str) -> tuple[str, ...]:
    return _HUB_KEYS if host in _HUB_HOSTS else (host,)


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f'"{key}" in docker\'s config.json is not an object')
    return value


def _environment_auths(environment: Mapping[str, str]) -> dict[str, Any]:
    text = environment.get("DOCKER_AUTH_CONFIG")
    if not text:
        return {}
    try:
        content = json.loads(text)
    except ValueError:
        # Without "from": the decoder's error carries the whole text, with its logins.
        raise ConfigError("the variable DOCKER_AUTH_CONFIG is not valid JSON") from None
    if not isinstance(content, dict):
        raise ConfigError("the variable DOCKER_AUTH_CONFIG is not a JSON object")
    return _table(content, "auths")


def _from_auths(auths: Mapping[str, Any], keys: tuple[str, ...]) -> Credentials | None:
    entry = next((auths[key] for key in keys if key in auths), None)
    if entry is None:
        # Old files have keys such as "https://host/v1/".
        entry = next((auths[key] for key in auths if _hostname(key) in keys), None)
    return _read_entry(entry) if isinstance(entry, dict) else None


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


def _ask_helper(name: str, server: str, environment: Mapping[str, str]) -> Credentials | None:
    program = f"docker-credential-{name}"
    if _HELPER_NAME.fullmatch(name) is None:
        raise ConfigError(f'"{name}" in docker\'s config.json is no name of a credential helper')
    path = shutil.which(program, path=environment.get("PATH"))
    if path is None:
        _log.warning("credential_helper.missing", helper=program, registry=server)
        return None
    try:
        done = subprocess.run(
            [path, "get"],
            input=server.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            timeout=_HELPER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        _log.warning("credential_helper.timed_out", helper=program, registry=server)
        return None
    except OSError as error:
        _log.warning("credential_helper.failed", helper=program, error=error.strerror)
        return None
    code, output = done.returncode, done.stdout
    if code != 0:
        # The protocol prints this sentence on stdout when it simply has no login.
        if b"credentials not found" not in output:
            _log.warning("credential_helper.failed", helper=program, registry=server, code=code)
        return None
    return _read_answer(program, output)


def _read_answer(program: str, output: bytes) -> Credentials | None:
    try:
        answer = json.loads(output)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        _log.warning("credential_helper.answer_invalid", helper=program)
        return None
    if not secret:
        return None
    return Credentials("" if username == _TOKEN_USER else username, secret)

"""Which container engine the user means: DOCKER_HOST, or the current docker context.

Source: docker CLI documentation, "Docker contexts" and "Environment variables". Order as in the
docker CLI: DOCKER_HOST, DOCKER_CONTEXT, `currentContext` of config.json, the default socket.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.dockerconfig import config_directory, read_docker_config
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class EngineTls:
    """Files of a TLS connection to an engine; `verify` checks the engine's certificate."""

    directory: Path
    verify: bool


@dataclass(frozen=True)
class Endpoint:
    """Address of an engine.

    Attributes:
        host: unix://, tcp://, ssh:// or npipe:// address.
        origin: what named it, for messages.
        tls: TLS material, None for none.
    """

    host: str
    origin: str
    tls: EngineTls | None

    def __str__(self) -> str:
        return f"{self.host} ({self.origin})"


def resolve_endpoint(environment: Mapping[str, str]) -> Endpoint:
    """Return the engine that docker itself would use in this environment.

    Raises:
        ConfigError: the named context does not exist or cannot be read.
    """
    if host := environment.get("DOCKER_HOST"):
        return Endpoint(host, "from DOCKER_HOST", _environment_tls(environment))
    name, origin = environment.get("DOCKER_CONTEXT"), "DOCKER_CONTEXT"
    if not name:
        current = read_docker_config(environment).get("currentContext")
        name, origin = current if isinstance(current, str) else "", "docker's config.json"
    if name and name != "default":
        return _context(name, origin, config_directory(environment) / "contexts")
    default = (
        "npipe:////./pipe/docker_engine"
        if sys.platform == "win32"
        else "unix:///var/run/docker.sock"
    )
    return Endpoint(default, "docker's default", None)


def _environment_tls(environment: Mapping[str, str]) -> EngineTls | None:
    verify = bool(environment.get("DOCKER_TLS_VERIFY"))
    if not verify and not environment.get("DOCKER_TLS"):
        return None
    named = environment.get("DOCKER_CERT_PATH")
    directory = config_directory(environment)
    return EngineTls(directory.__class__(named) if named else directory, verify)


def _context(name: str, origin: str, store: Path) -> Endpoint:
    folder = hashlib.sha256(name.encode()).hexdigest()
    path = store / "meta" / folder / "meta.json"
    try:
        endpoint = json.loads(path.read_bytes())["Endpoints"]["docker"]
        host, skip = endpoint["Host"], bool(endpoint.get("SkipTLSVerify", False))
    except FileNotFoundError as error:
        raise ConfigError(
            f'the docker context "{name}", named by {origin}, does not exist; see docker context ls'
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'the docker context "{name}" cannot be read from {path}') from error
    if not isinstance(host, str) or not host:
        raise ConfigError(f'the docker context "{name}" names no engine')
    certificates = store / "tls" / folder / "docker"
    tls = EngineTls(certificates, not skip) if certificates.is_dir() else None
    return Endpoint(host, f'docker context "{name}"', tls)

"""The user's docker configuration: where it is and what it says.

Source: docker CLI documentation, "Docker CLI configuration files". The environment is an argument,
because a program that serves several users has one environment per user.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def home_directory(environment: Mapping[str, str]) -> Path:
    """Return the home directory that `environment` names, else that of the running user."""
    named = environment.get("HOME") or environment.get("USERPROFILE")
    return Path(named) if named else Path.home()


def config_directory(environment: Mapping[str, str]) -> Path:
    """Return docker's configuration directory: `DOCKER_CONFIG` or ~/.docker."""
    named = environment.get("DOCKER_CONFIG")
    return Path(named) if named else home_directory(environment) / ".docker"


def read_docker_config(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of docker's config.json; empty when there is none.

    Raises:
        ConfigError: the file cannot be read or is no JSON object.
    """
    path = config_directory(environment) / "config.json"
    try:
        content = json.loads(path.read_bytes() or b"{}")
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        # Without "from": the decoder's error carries the whole document, with its logins.
        raise ConfigError(f"{path} is not valid JSON; repair or remove it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; repair or remove it")
    return content

"""Which gateway and which project: option > environment > project file > user file.

The project file is `offload.toml` in the directory of the build context or in one above it; the
user file is `config.toml` in the configuration directory, written by `offload login`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from offload_core.config import read_toml
from offload_core.errors import ConfigError
from offload_core.trust import join_address, split_address

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offload_client.invocation import Invocation

PROJECT_FILE = "offload.toml"
USER_FILE = "config.toml"
KEYS = {
    "gateway": "address of the gateway, https://HOST:PORT",
    "gateway_ca": "SHA-256 fingerprint of the gateway's CA, for logins without a token of ours",
    "project": "project that builds belong to",
    "session_sync_files": "most files of a directory that is mounted into a session",
    "session_sync_bytes": "most bytes of such a directory, for example 20GiB",
}
DEFAULT_PROJECT = "default"


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one command."""

    gateway: str
    """HOST:PORT."""
    project: str


def resolve_settings(
    invocation: Invocation,
    *,
    gateway: str | None = None,
    project: str | None = None,
    directory: Path | None = None,
) -> Settings:
    """Find gateway and project.

    Args:
        invocation: the command.
        gateway: value of --gateway.
        project: value of --project.
        directory: where the search for the project file begins; the current one when None.

    Raises:
        ConfigError: no gateway is configured, or a file is wrong.
    """
    environment = invocation.environment
    gateway = gateway or environment.get("OFFLOAD_GATEWAY") or None
    project = project or environment.get("OFFLOAD_PROJECT") or None
    if gateway is None or project is None:
        nearest = _find_project_file(directory or invocation.cwd)
        for file in (nearest, invocation.config_dir() / USER_FILE):
            values = _read(file) if file is not None and _is_file(file) else {}
            gateway = gateway or values.get("gateway")
            project = project or values.get("project")
    if gateway is None:
        raise ConfigError(
            "no gateway is configured",
            hint="run 'offload login https://HOST:PORT', or set OFFLOAD_GATEWAY",
        )
    return Settings(join_address(*split_address(gateway)), project or DEFAULT_PROJECT)


def pinned_ca(invocation: Invocation, gateway: str) -> str:
    """Return the fingerprint of a gateway's CA, empty when it is not known.

    OFFLOAD_CA, else the file that names this gateway: the project file above the current
    directory, or the user file.

    Raises:
        ConfigError: a file is wrong.
    """
    if told := invocation.environment.get("OFFLOAD_CA"):
        return told
    nearest = _find_project_file(invocation.cwd)
    for file in (nearest, invocation.config_dir() / USER_FILE):
        values = _read(file) if file is not None and _is_file(file) else {}
        address = values.get("gateway")
        if address and join_address(*split_address(address)) == gateway:
            return values.get("gateway_ca", "")
    return ""


def user_value(invocation: Invocation, key: str) -> str:
    """Return a value of the user file, empty when it is not there.

    Raises:
        ConfigError: the file is wrong.
    """
    path = invocation.config_dir() / USER_FILE
    return _read(path).get(key, "") if _is_file(path) else ""


def remember_gateway(invocation: Invocation, gateway: str, *, ca: str = "") -> Path:
    """Write the gateway into the user file, keeping its other keys; return the file.

    Args:
        invocation: the command.
        gateway: HOST:PORT.
        ca: fingerprint of its CA; empty to keep the one of the same gateway.

    Raises:
        ConfigError: the file cannot be written, or is wrong as it is.
    """
    folder = invocation.config_dir()
    path = folder / USER_FILE
    values = _read(path) if _is_file(path) else {}
    if values.get("gateway") != f"https://{gateway}":
        values.pop("gateway_ca", None)
    values["gateway"] = f"https://{gateway}"
    if ca:
        values["gateway_ca"] = ca
    lines = [f"{key} = {_quoted(value)}" for key, value in sorted(values.items())]
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch.write_text("\n".join(lines) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    return path


def project_file_text(values: Mapping[str, str]) -> str:
    """Return the text of a project file with the keys of `KEYS`; empty values are left out."""
    return "".join(f"{key} = {_quoted(values[key])}\n" for key in KEYS if values.get(key))


def read_project_file(path: Path) -> dict[str, str]:
    """Return the values of a project file.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    return _read(path)


def _find_project_file(directory: Path) -> Path | None:
    # Without links and "..", so that the parents are those that the files really have.
    with contextlib.suppress(OSError, RuntimeError):
        directory = directory.resolve()
        for folder in (directory, *directory.parents):
            if (folder / PROJECT_FILE).is_file():
                return folder / PROJECT_FILE
            if (folder / ".git").exists():
                return None
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _read(path: Path) -> dict[str, str]:
    values: dict[str, Any] = read_toml(path)
    for key, value in values.items():
        if key not in KEYS:
            known = ", ".join(sorted(KEYS))
            raise ConfigError(f"{path}: unknown key {key!r}; known keys are {known}")
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {key} must be a text in quotes: {KEYS[key]}")
    return values


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

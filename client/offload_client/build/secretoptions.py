"""--secret, --ssh and --allow: docker buildx's meanings and errors.

Source: buildx's util/buildflags (secrets.go, ssh.go, entitlements.go) and BuildKit's
util/entitlements.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.devices import read_wish
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_AGENT = "default"
ENTITLEMENTS = ("network.host", "security.insecure", "device")


@dataclass(frozen=True)
class SecretOption:
    """One --secret.

    Attributes:
        id: name that the Dockerfile uses.
        path: file that holds it; empty for none.
        variable: environment variable that holds it, which counts more; empty for none.
    """

    id: str
    path: str = ""
    variable: str = ""


@dataclass(frozen=True)
class AgentOption:
    """One --ssh.

    Attributes:
        id: name that the Dockerfile uses.
        paths: one socket of an agent, or files with keys; empty for the user's agent.
    """

    id: str
    paths: Sequence[str] = ()


def parse_secrets(values: Sequence[str]) -> list[SecretOption]:
    """Return --secret values; of one id, the last counts.

    Raises:
        InvalidValueError: with what is wrong; no message has the value of a secret.
    """
    found: dict[str, SecretOption] = {}
    for text in values:
        if text:
            secret = _parse_secret(text)
            found[secret.id] = secret
    return list(found.values())


def _parse_secret(text: str) -> SecretOption:
    values: dict[str, str] = {}
    for part in _fields("--secret", text):
        key, equals, value = part.partition("=")
        key = {"source": "src"}.get(key.lower(), key.lower())
        if not equals:
            raise InvalidValueError(
                f"invalid --secret: invalid field '{part}' must be a key=value pair"
            )
        if key == "type" and value not in ("file", "env"):
            raise InvalidValueError(f'invalid --secret: unsupported secret type "{value}"')
        if key not in ("type", "id", "src", "env"):
            raise InvalidValueError(f"invalid --secret: unexpected key '{key}' in '{part}'")
        values[key] = value
    path, variable = values.get("src", ""), values.get("env", "")
    if values.get("type") == "env" and not variable:
        path, variable = "", path
    if not values.get("id"):
        raise InvalidValueError("invalid --secret: secret missing ID; write for example id=token")
    return SecretOption(_sendable("--secret", values["id"]), path, variable)


def parse_agents(values: Sequence[str]) -> list[AgentOption]:
    """Return --ssh values; of one id, the last counts.

    Raises:
        InvalidValueError: it cannot be sent.
    """
    found: dict[str, AgentOption] = {}
    for text in values:
        if text:
            name, equals, paths = text.partition("=")
            name = _sendable("--ssh", name or DEFAULT_AGENT)
            found[name] = AgentOption(name, paths.split(",") if equals and paths else ())
    return list(found.values())


def parse_entitlements(values: Sequence[str]) -> list[str]:
    """Return --allow values, each once.

    Raises:
        InvalidValueError: there is no such entitlement.
    """
    found: dict[str, None] = {}
    for text in values:
        if not text:
            continue
        name, equals, rest = text.partition("=")
        if name not in ENTITLEMENTS or (equals and name != "device"):
            raise InvalidValueError(
                f"unknown entitlement {text}; use {', '.join(ENTITLEMENTS)} or device=NAME"
            )
        if rest:
            read_wish(text)
        found[_sendable("--allow", text)] = None
    return list(found)


def _fields(flag: str, text: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text), strict=True), [])
    except csv.Error as error:
        raise InvalidValueError(f"invalid {flag}: it is not a list of KEY=VALUE") from error


def _sendable(flag: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(f"{flag} has bytes that are not UTF-8") from None
    return text

"""Finding and reading bake files without docker buildx.

Source: docker's reference of `docker buildx bake`, "--file".
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from offload_client.bake.composefile import ComposeFile, parse_yaml
from offload_client.bake.definition import Definition
from offload_client.bake.hclfile import BakeBlocks, parse_hcl, parse_json
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from offload_client.invocation import Invocation

COMPOSE_NAMES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
BAKE_NAMES = (
    "docker-bake.json", "docker-bake.hcl", "docker-bake.override.json", "docker-bake.override.hcl",
)  # fmt: skip
STANDARD_INPUT = "-"
MAX_BYTES = 8 << 20


def read_definition(invocation: Invocation, files: Sequence[str]) -> Definition:
    """Return what bake files say together.

    Args:
        invocation: where the command was started, its environment and standard input.
        files: values of -f; the usual names when there are none.

    Raises:
        BakeError: a file is missing, wrong, or uses what only docker buildx understands.
    """
    named = _read_all(invocation, files)
    definition = Definition()
    blocks = BakeBlocks(invocation.environment)
    has_blocks = False
    for name, text in named:
        kind = _kind(name, text)
        if kind == "yaml":
            environment = _compose_environment(invocation)
            ComposeFile(name, parse_yaml(name, text), environment).into(definition)
            continue
        has_blocks = True
        is_json = kind == "json"
        document = parse_json(name, text) if is_json else parse_hcl(name, text)
        blocks.add(name, document, is_json=is_json)
    if has_blocks:
        blocks.into(definition)
    return definition


def _read_all(invocation: Invocation, files: Sequence[str]) -> list[tuple[str, str]]:
    if not files:
        present = [
            name for name in (*COMPOSE_NAMES, *BAKE_NAMES) if (invocation.path(name)).is_file()
        ]
        if not present:
            raise BakeError("couldn't find a bake definition")
        files = present
    return [(name, _read(invocation, name)) for name in files]


def _read(invocation: Invocation, name: str) -> str:
    try:
        if name == STANDARD_INPUT:
            with os.fdopen(os.dup(invocation.stdin), "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        else:
            with invocation.path(name).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise BakeError(f"failed to read {name}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise BakeError(f"{name} has more than {MAX_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BakeError(f"{name} is not UTF-8") from None


def _kind(name: str, text: str) -> str:
    lower = name.lower()
    for suffix, kind in ((".yml", "yaml"), (".yaml", "yaml"), (".json", "json"), (".hcl", "hcl")):
        if lower.endswith(suffix):
            return kind
    if text.lstrip().startswith("{"):
        return "json"
    return "yaml" if any(line.startswith("services:") for line in text.splitlines()) else "hcl"


def _compose_environment(invocation: Invocation) -> Mapping[str, str]:
    """Return the environment over what a file `.env` beside says."""
    return {**_dotenv(invocation.path(".env")), **invocation.environment}


def _dotenv(path: Path) -> dict[str, str]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise BakeError(f"cannot read {path}: {error}") from error
    found = {}
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and name and not name.startswith("#"):
            found[name.strip()] = _dotenv_value(value.strip())
    return found


def _dotenv_value(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text.partition(" #")[0].rstrip()

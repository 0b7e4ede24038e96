"""What bake files say, before inheritance and overrides."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from offload_core.errors import BakeError

TARGET_NAME = re.compile(r"[a-zA-Z0-9_-]+")
MERGED_LISTS = frozenset(
    ("annotations", "attest", "secret", "ssh", "cache-from", "no-cache-filter", "ulimits",
     "entitlements")
)  # fmt: skip
"""Lists that grow when targets are merged; others are replaced."""
MERGED_MAPS = frozenset(("args", "labels", "contexts", "extra-hosts"))
_LISTS = MERGED_LISTS | {"inherits"}
TARGET_FIELDS = (
    frozenset(
        ("inherits", "description", "context", "dockerfile", "dockerfile-inline", "tags", "target",
         "platforms", "cache-to", "output", "pull", "no-cache", "network", "shm-size", "call")
    )
    | MERGED_LISTS
    | MERGED_MAPS
)  # fmt: skip
"""Fields of a target; source: docker's bake file reference."""
OLD_NAMES = {"platform": "platforms", "secrets": "secret", "outputs": "output"}


@dataclass(frozen=True)
class Variable:
    """A variable as `--list variables` shows it."""

    name: str
    value: str
    description: str = ""
    type: str = ""


@dataclass
class Definition:
    """Targets, groups and variables of all files together."""

    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    """Of groups."""
    variables: list[Variable] = field(default_factory=list)

    def add_target(self, name: str, fields: dict[str, Any]) -> None:
        """Add a target; one that is there already takes what the new one says.

        Raises:
            BakeError: the name or a field is not known to docker buildx.
        """
        check_name("target", name)
        for key, value in fields.items():
            if key not in TARGET_FIELDS:
                raise BakeError(f'target {name}: there is no field "{key}" in a bake file')
            if key in MERGED_MAPS and not isinstance(value, dict | None):
                raise BakeError(f"target {name}: {key} is not an object")
            if key in _LISTS and not isinstance(value, list | None):
                raise BakeError(f"target {name}: {key} is not a list")
        self.targets[name] = merged(self.targets.get(name, {}), fields)

    def add_group(self, name: str, targets: list[str], description: str = "") -> None:
        """Add a group; one that is there already grows.

        Raises:
            BakeError: the name is none.
        """
        check_name("group", name)
        known = self.groups.setdefault(name, [])
        known += [target for target in targets if target not in known]
        if description:
            self.descriptions[name] = description


def check_name(kind: str, name: str) -> None:
    """Refuse a name that docker buildx refuses.

    Raises:
        BakeError: with what is allowed.
    """
    if not TARGET_NAME.fullmatch(name):
        raise BakeError(f'invalid name of a {kind} "{name}": only "a-zA-Z0-9_-" are allowed')


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of one target under those of another, by buildx's rules."""
    result = dict(base)
    for key, value in over.items():
        if value is None:
            continue
        if key in MERGED_MAPS:
            before = result.get(key) or {}
            result[key] = before | {name: item for name, item in value.items() if item is not None}
        elif key in MERGED_LISTS:
            result[key] = [*(result.get(key) or []), *value]
        else:
            result[key] = value
    return result

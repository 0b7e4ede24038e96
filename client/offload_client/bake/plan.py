"""What is to be built: targets with their fields, groups, and who needs whom."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload_core.errors import BakeError, InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping

TARGET = "target:"
"""What a named context begins with that is another target."""
FIELD_ORDER = (
    "description", "annotations", "attest", "context", "contexts", "dockerfile",
    "dockerfile-inline", "args", "labels", "tags", "cache-from", "cache-to", "target", "secret",
    "ssh", "platforms", "output", "pull", "no-cache", "network", "no-cache-filter", "shm-size",
    "ulimits", "call", "entitlements", "extra-hosts",
)  # fmt: skip
"""As docker buildx prints them."""
_ESCAPED_TEXTS = ("dockerfile-inline",)
_ESCAPED_MAPS = ("args", "labels", "extra-hosts")
_ESCAPED_LISTS = ("annotations",)


@dataclass(frozen=True)
class BakePlan:
    """Targets with all their fields, as `docker buildx bake --print` tells them.

    Attributes:
        targets: fields by name; also those that only others need.
        groups: members by name; "default" are those that were asked for.
    """

    targets: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def needs(self, name: str) -> dict[str, str]:
        """Return the named contexts of a target that are other targets, by context name."""
        contexts = self.targets[name].get("contexts") or {}
        return {
            context: value.removeprefix(TARGET)
            for context, value in contexts.items()
            if value.startswith(TARGET)
        }

    def needed(self) -> set[str]:
        """Return the targets that others need."""
        return {other for name in self.targets for other in self.needs(name).values()}

    def check(self) -> None:
        """Refuse contexts that lead nowhere, or in a circle.

        Raises:
            BakeError: in docker buildx's words.
        """
        for name in self.targets:
            self._check_links(name, [])

    def _check_links(self, name: str, visited: list[str]) -> None:
        for other in self.needs(name).values():
            if other == name:
                raise BakeError(f"target {name} cannot link to itself")
            if other in visited:
                raise BakeError(f"infinite loop from {name} to {other}")
            if other not in self.targets:
                raise BakeError(f"failed to find target {other}")
            self._check_links(other, [*visited, name])

    def document(self) -> str:
        """Return the plan as `--print` shows it."""
        groups = {name: self.groups[name] for name in sorted(self.groups)}
        shown: dict[str, Any] = {"group": groups} if groups else {}
        shown["target"] = {
            name: _ordered(_escaped(self.targets[name], _escape)) for name in sorted(self.targets)
        }
        return json.dumps(shown, indent=2, ensure_ascii=False)


def read_plan(text: str) -> BakePlan:
    """Return the plan that `docker buildx bake --print` has written.

    Raises:
        InternalError: it is something else.
    """
    try:
        document = json.loads(text)
        targets = {
            str(name): _escaped(fields, _unescape)
            for name, fields in (document.get("target") or {}).items()
        }
        return BakePlan(targets, document.get("group") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise InternalError("docker buildx has printed a plan that cannot be read") from error


def _ordered(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _by_name(fields[name]) for name in FIELD_ORDER if name in fields}


def _by_name(value: Any) -> Any:
    """Return a value whose objects have their members in the order of the alphabet, as Go's."""
    if isinstance(value, dict):
        return {key: _by_name(value[key]) for key in sorted(value)}
    return [_by_name(item) for item in value] if isinstance(value, list) else value


def _escape(text: str) -> str:
    return text.replace("${", "$${").replace("%{", "%%{")


def _unescape(text: str) -> str:
    # buildx escapes what it prints, so that it can be a bake file again.
    return text.replace("$${", "${").replace("%%{", "%{")


def _escaped(fields: Mapping[str, Any], change: Any) -> dict[str, Any]:
    result = dict(fields)
    for key in _ESCAPED_TEXTS:
        if isinstance(result.get(key), str):
            result[key] = change(result[key])
    for key in _ESCAPED_MAPS:
        if isinstance(result.get(key), dict):
            result[key] = {
                name: change(value) if isinstance(value, str) else value
                for name, value in result[key].items()
            }
    for key in _ESCAPED_LISTS:
        if isinstance(result.get(key), list):
            result[key] = [change(value) for value in result[key]]
    return result

"""--set and the flags that are short for it, as docker buildx applies them.

Source: docker's reference of `docker buildx bake`, "--set", and buildx's bake/bake.go.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload_client.bake.entries import entry_object
from offload_client.build.callrequest import parse_call
from offload_client.goboolean import parse_boolean
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from offload_client.bake.request import BakeRequest

_LISTS = {
    "output": "output",
    "cache-to": "cache-to",
    "cache-from": "cache-from",
    "tags": "tags",
    "platform": "platforms",
    "secrets": "secret",
    "ssh": "ssh",
    "attest": "attest",
    "entitlements": "entitlements",
    "annotations": "annotations",
    "no-cache-filter": "no-cache-filter",
    "ulimits": "ulimits",
}
_ADDED = frozenset(("secrets", "ssh", "attest", "annotations", "entitlements"))
"""Lists to which a value is always added."""
_TEXTS = frozenset(("context", "dockerfile", "target", "call", "shm-size", "network"))
_SWITCHES = frozenset(("no-cache", "pull"))
_MAPS = frozenset(("args", "contexts", "labels", "extra-hosts"))


@dataclass
class Overrides:
    """What is set for one target, in the order of the command line."""

    lists: dict[str, list[str]] = field(default_factory=dict)
    append: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    maps: dict[str, dict[str, str]] = field(default_factory=dict)


def read_overrides(
    request: BakeRequest, targets: Collection[str], environment: Mapping[str, str]
) -> dict[str, Overrides]:
    """Return what a command line sets, by target.

    Raises:
        BakeError: a value has another form, or means no target.
    """
    found: dict[str, Overrides] = {}
    for text in [*request.overrides, *_short_forms(request)]:
        _read_one(text, targets, environment, found)
    return found


def _short_forms(request: BakeRequest) -> list[str]:
    flags = []
    if request.push:
        flags.append("*.push=true")
    if request.load:
        flags.append("*.load=true")
    if (call := parse_call(request.call)) is not None:
        flags.append(f"*.call={call.name}")
    if request.no_cache is not None:
        flags.append(f"*.no-cache={str(request.no_cache).lower()}")
    if request.pull is not None:
        flags.append(f"*.pull={str(request.pull).lower()}")
    for kind, value in (("sbom", request.sbom), ("provenance", request.provenance)):
        if value:
            truth = parse_boolean(value)
            said = value if truth is None else f"disabled={str(not truth).lower()}"
            flags.append(f"*.attest=type={kind},{said}")
    return flags


def _read_one(
    text: str,
    targets: Collection[str],
    environment: Mapping[str, str],
    found: dict[str, Overrides],
) -> None:
    path, equals, value = text.partition("=")
    keys = path.removesuffix("+").split(".", 2)
    if len(keys) < 2:
        raise BakeError(f"invalid override key {path.removesuffix('+')}, expected target.name")
    pattern, key = keys[0], keys[1]
    if not equals and key != "args":
        raise BakeError(f"invalid override {text}, expected target.name=value")
    names = [name for name in targets if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise BakeError(f"could not find any target matching '{pattern}'")
    for name in names:
        own = found.setdefault(name, Overrides())
        if key in _MAPS:
            if len(keys) != 3:
                raise BakeError(f"invalid key {path}, {key} requires name")
            if equals:
                own.maps.setdefault(key, {})[keys[2]] = value
            elif keys[2] in environment:
                own.maps.setdefault(key, {})[keys[2]] = environment[keys[2]]
        elif key in _LISTS:
            own.lists.setdefault(key, []).append(value)
            if path.endswith("+"):
                own.append.add(key)
        elif key in _TEXTS | _SWITCHES | {"push", "load"}:
            own.texts[key] = value
        else:
            raise BakeError(f"unknown key: {key}")


def apply_overrides(fields: dict[str, Any], overrides: Overrides | None) -> dict[str, Any]:
    """Return the fields of a target with what was set.

    Raises:
        BakeError: a value is not true or false where it should be.
    """
    if overrides is None:
        return fields
    result = dict(fields)
    for key, named in overrides.maps.items():
        result[key] = {**(result.get(key) or {}), **named}
    for key, values in overrides.lists.items():
        name = _LISTS[key]
        before = result.get(name) or [] if key in overrides.append | _ADDED else []
        result[name] = [*before, *values]
    for key, value in overrides.texts.items():
        if key in _TEXTS:
            result[key] = value
        elif key in _SWITCHES:
            result[key] = _boolean(key, value)
    # Last, because what they add depends on the outputs that there are.
    if "push" in overrides.texts:
        result["output"] = _pushed(_outputs(result), _boolean("push", overrides.texts["push"]))
    if "load" in overrides.texts and _boolean("load", overrides.texts["load"]):
        result["output"] = _loaded(_outputs(result))
    if not result.get("output", ("none",)):
        # buildx's plan does not have it either.
        del result["output"]
    return result


def _boolean(key: str, value: str) -> bool:
    found = parse_boolean(value)
    if found is None:
        raise BakeError(f"invalid value {value} for boolean key {key}")
    return found


def _outputs(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(entry_object("output", entry)) for entry in fields.get("output") or ()]


def _pushed(outputs: Sequence[dict[str, Any]], push: bool) -> list[dict[str, Any]]:
    if not push:
        return [
            {**output, "push": "false"} if output.get("type") == "image" else output
            for output in outputs
            if output.get("type") != "registry"
        ]
    result = [
        {**output, "push": "true"} if output.get("type") == "image" else output
        for output in outputs
    ]
    if all(output.get("type") == "docker" for output in outputs):
        result.append({"type": "image", "push": "true"})
    return result


def _loaded(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for output in outputs:
        kind = output.get("type")
        if kind == "docker" and not output.get("dest"):
            return outputs
        if kind not in ("docker", "image", "registry", "oci"):
            return outputs
    return [*outputs, {"type": "docker"}]

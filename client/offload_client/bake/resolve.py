"""From the definition to the plan: patterns, groups, inheritance, overrides, links.

Source: buildx's bake/bake.go, ReadTargets.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from offload_client.bake.definition import MERGED_MAPS, Definition, merged
from offload_client.bake.entries import ENTRY_FIELDS, distinct, entry_object
from offload_client.bake.hclexpression import to_text
from offload_client.bake.overrides import apply_overrides, read_overrides
from offload_client.bake.plan import BakePlan
from offload_client.build.options import EPOCH
from offload_core.errors import BakeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_client.bake.overrides import Overrides
    from offload_client.bake.request import BakeRequest

_LISTS = frozenset(
    ("tags", "platforms", "annotations", "entitlements", "no-cache-filter", "ulimits", "inherits")
)
_TEXTS = frozenset(
    ("context", "dockerfile", "dockerfile-inline", "target", "network", "shm-size", "call",
     "description")
)  # fmt: skip
_SWITCHES = frozenset(("pull", "no-cache"))


def resolve_plan(
    definition: Definition, request: BakeRequest, environment: Mapping[str, str]
) -> BakePlan:
    """Return what a command line means.

    Raises:
        BakeError: a target is missing or wrong; in docker buildx's words where it has some.
    """
    overrides = read_overrides(request, definition.targets, environment)
    names = _asked_for(definition, [name.replace(".", "_") for name in request.targets])
    targets: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name in names:
        members, within = _group(definition, name, [])
        for member in members:
            targets[member] = _target(definition, member, overrides)
        groups |= {group: _shown_group(definition, group) for group in within}
    default = groups.get("default", {})
    # A target "default" is a member of the group of that name, where no file has that group.
    asked = {name for name in names if name != "default" or not default}
    groups["default"] = {**default, "targets": sorted({*default.get("targets", ()), *asked})}
    waiting = list(targets)
    while waiting:
        for other in BakePlan(targets).needs(waiting.pop()).values():
            if other not in targets:
                targets[other] = _target(definition, other, overrides)
                targets[other]["output"] = [{"type": "cacheonly"}]
                waiting.append(other)
    if date := environment.get(EPOCH):
        for name, fields in targets.items():
            targets[name] = {**fields, "args": {EPOCH: date, **(fields.get("args") or {})}}
    plan = BakePlan(targets, groups)
    plan.check()
    for name in targets:
        _check_platforms(plan, name)
    return plan


def _asked_for(definition: Definition, patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        if not any(mark in pattern for mark in "*?["):
            found.append(pattern)
            continue
        known: Iterable[str] = (*definition.groups, *definition.targets)
        matching = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise BakeError(f"could not find any target matching '{pattern}'")
        found += matching
    return list(dict.fromkeys(found))


def _group(definition: Definition, name: str, visited: list[str]) -> tuple[list[str], list[str]]:
    """Return the targets and the groups that a name means."""
    if name not in definition.groups:
        return [name], []
    if name in visited:
        return [], []
    targets, groups = [], [name]
    for member in definition.groups[name]:
        more, within = _group(definition, member, [*visited, name])
        targets += more
        groups += within
    return list(dict.fromkeys(targets)), list(dict.fromkeys(groups))


def _shown_group(definition: Definition, name: str) -> dict[str, Any]:
    shown: dict[str, Any] = {"targets": definition.groups[name]}
    if name in definition.descriptions:
        shown = {"description": definition.descriptions[name], **shown}
    return shown


def _target(
    definition: Definition, name: str, overrides: Mapping[str, Overrides]
) -> dict[str, Any]:
    fields = _inherited(definition, name, overrides, [])
    fields.pop("inherits", None)
    fields["context"] = fields.get("context") or "."
    fields["dockerfile"] = fields.get("dockerfile") or "Dockerfile"
    return fields


def _inherited(
    definition: Definition, name: str, overrides: Mapping[str, Overrides], visited: list[str]
) -> dict[str, Any]:
    own = definition.targets.get(name)
    if own is None:
        raise BakeError(f"failed to find target {name}")
    fields: dict[str, Any] = {}
    for parent in own.get("inherits") or ():
        # As buildx does, a target that inherits itself gains nothing by that.
        if parent not in visited:
            above = _inherited(definition, str(parent), overrides, [*visited, name])
            fields = merged(fields, above)
    return _normal(name, apply_overrides(merged(fields, _typed(name, own)), overrides.get(name)))


def _typed(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the types that they must have."""
    result: dict[str, Any] = {}
    for key, value in fields.items():
        if value is None:
            continue
        where = f"target {name}: {key}"
        if key in MERGED_MAPS:
            result[key] = _texts_by_name(where, value)
        elif key in ENTRY_FIELDS:
            result[key] = [entry_object(key, entry) for entry in _list(where, value)]
        elif key in _LISTS:
            result[key] = [to_text(item) for item in _list(where, value) if item is not None]
        elif key in _TEXTS:
            result[key] = to_text(value)
        elif key in _SWITCHES:
            if not isinstance(value, bool):
                raise BakeError(f"{where} is neither true nor false")
            result[key] = value
        else:
            raise BakeError(f"{where}: there is no such field")
    return result


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BakeError(f"{where} is not a list")
    return value


def _texts_by_name(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BakeError(f"{where} is not an object")
    return {str(key): to_text(item) for key, item in value.items() if item is not None}


def _normal(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    result = _typed(name, fields)
    for key in _LISTS:
        if key in result:
            result[key] = list(dict.fromkeys(result[key]))
    for key in ENTRY_FIELDS:
        if key in result:
            result[key] = distinct(key, result[key])
    if result.get("network") == "host":
        result["entitlements"] = list(
            dict.fromkeys([*(result.get("entitlements") or []), "network.host"])
        )
    contexts = {key: value for key, value in (result.get("contexts") or {}).items() if value}
    result.pop("contexts", None)
    if contexts:
        result["contexts"] = contexts
    return result


def _check_platforms(plan: BakePlan, name: str) -> None:
    mine = plan.targets[name].get("platforms") or []
    for other in plan.needs(name).values():
        theirs = plan.targets[other].get("platforms") or []
        if len(mine) > 1 and len(theirs) > 1 and not set(mine) <= set(theirs):
            raise BakeError(
                f"target {other} can't be used by {name} because its platforms "
                f"[{' '.join(theirs)}] are not a subset of [{' '.join(mine)}]"
            )

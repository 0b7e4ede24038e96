"""`--list`: the targets or the variables of bake files, as docker buildx shows them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.bake.definition import Definition

KINDS = ("targets", "variables")
FORMATS = ("table", "json")


def parse_list(text: str) -> tuple[str, str]:
    """Return kind and format of a value of --list: "targets", or "type=targets,format=json".

    Raises:
        InvalidValueError: there is no such kind or format.
    """
    kind, form = text, "table"
    if "=" in text:
        values = dict(part.partition("=")[::2] for part in text.split(","))
        kind, form = values.pop("type", ""), values.pop("format", form)
        if values:
            raise InvalidValueError(f'invalid --list "{text}": unknown key "{min(values)}"')
    if kind not in KINDS or form not in FORMATS:
        raise InvalidValueError(
            f'invalid --list "{text}": write targets or variables, or for example '
            "type=targets,format=json"
        )
    return kind, form


def listed(definition: Definition, kind: str, form: str) -> str:
    """Return the text of a list.

    Args:
        definition: what the files say.
        kind: "targets" or "variables".
        form: "table" or "json".
    """
    rows = _targets(definition) if kind == "targets" else _variables(definition)
    if form == "json":
        shown = [{key: value for key, value in row.items() if value} for row in rows]
        return json.dumps(shown, indent=2)
    keys = ["name", "description"]
    if kind == "variables":
        keys[1:1] = ["type", "value"]
    head = ["TARGET" if kind == "targets" else "VARIABLE", *map(str.upper, keys[1:])]
    table = [head, *([str(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(keys))]
    return "\n".join(_line(line, widths) for line in table)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "   ".join(padded).rstrip()


def _targets(definition: Definition) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "description": definition.descriptions.get(name) or ", ".join(members),
            "group": True,
        }
        for name, members in definition.groups.items()
    ]
    rows += [
        {"name": name, "description": fields.get("description") or ""}
        for name, fields in definition.targets.items()
    ]
    return sorted(rows, key=lambda row: str(row["name"]))


def _variables(definition: Definition) -> list[dict[str, Any]]:
    return [
        {
            "name": variable.name,
            "type": variable.type,
            "value": variable.value,
            "description": variable.description,
        }
        for variable in definition.variables
    ]

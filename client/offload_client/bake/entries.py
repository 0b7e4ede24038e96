"""The list entries of a target that are CSV of KEY=VALUE: outputs, caches, secrets, attestations.

docker buildx prints them as objects; bake files write them as strings or objects.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from offload_client.goboolean import parse_boolean
from offload_core.errors import BakeError

ENTRY_FIELDS = frozenset(("output", "cache-from", "cache-to", "attest", "secret", "ssh"))


def entry_object(field: str, entry: Any) -> dict[str, Any]:
    """Return an entry as docker buildx prints it.

    Raises:
        BakeError: it is neither a string nor an object.
    """
    if isinstance(entry, dict):
        return entry
    if not isinstance(entry, str):
        raise BakeError(f"an entry of {field} is neither a string nor an object")
    if field == "ssh":
        name, _, paths = entry.partition("=")
        return {"id": name, "paths": paths.split(",")} if paths else {"id": name}
    try:
        parts = next(csv.reader(io.StringIO(entry)), [])
    except csv.Error as error:
        raise BakeError(f"an entry of {field} is not a list of KEY=VALUE: {error}") from error
    if len(parts) == 1 and "=" not in entry:
        return _short(field, entry)
    if len(parts) == 1 and field == "output" and not entry.startswith(("type=", "dest=")):
        return _short(field, entry)
    values = dict(part.partition("=")[::2] for part in parts)
    if field in ("cache-from", "cache-to") and "type" not in values:
        values = {"type": "registry", **values}
    found: dict[str, Any] = {key.strip().lower(): value for key, value in values.items()}
    if field == "attest" and "disabled" in found and not parse_boolean(found.pop("disabled")):
        return found
    return {**found, "disabled": True} if field == "attest" and "disabled" in values else found


def distinct(field: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries without repetitions; of attestations of one type, the last counts."""
    if field == "attest":
        return list({entry.get("type"): entry for entry in entries}.values())
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def _short(field: str, text: str) -> dict[str, Any]:
    if field == "output":
        return {"type": "tar", "dest": "-"} if text == "-" else {"type": "local", "dest": text}
    if field in ("cache-from", "cache-to"):
        return {"type": "registry", "ref": text}
    raise BakeError(f'the entry "{text}" of {field} is not KEY=VALUE')


def entry_text(field: str, entry: Any) -> str:
    """Return an entry as the flag of `docker buildx build` takes it.

    Raises:
        BakeError: as `entry_object`.
    """
    if isinstance(entry, str):
        return entry
    values = entry_object(field, entry)
    if field == "ssh":
        paths = ",".join(values.get("paths") or ())
        return f"{values.get('id', 'default')}={paths}" if paths else str(values.get("id"))
    values = {**values, **(values.get("attrs") or {})}
    values.pop("attrs", None)
    parts = [f"{key}={_text(value)}" for key, value in values.items() if value is not None]
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(parts)
    return stream.getvalue()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)

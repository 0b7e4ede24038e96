"""Values of --metadata-file, in buildx's form.

Source: docker/buildx commands/build.go (decodeExporterResponse) and util/confutil/metadata.go.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from offload_client.goboolean import parse_boolean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_proto.v1.events_pb2 import VertexWarning

WARNINGS = "BUILDX_METADATA_WARNINGS"
PROVENANCE = "BUILDX_METADATA_PROVENANCE"
RESULT = "result.json"


def with_warnings(environment: Mapping[str, str]) -> bool:
    """Return whether the metadata file is to have the warnings of the build."""
    return parse_boolean(environment.get(WARNINGS, "")) is True


def provenance_mode(environment: Mapping[str, str]) -> str:
    """Return how much provenance the metadata file is to have: "min", "max" or "" for none."""
    text = environment.get(PROVENANCE, "")
    if text == "disabled" or parse_boolean(text) is False:
        return ""
    return "max" if text == "max" else "min"


def warning_values(warnings: Sequence[VertexWarning]) -> list[dict[str, Any]]:
    """Return warnings as Go writes BuildKit's client.VertexWarning."""
    from offload_client.progress.statusjson import warning_value

    return [warning_value(warning) for warning in warnings]


def called_value(key: str, value: bytes) -> Any:
    """Return one note of the answer to --call."""
    text = value.decode("utf-8", "replace")
    if key != RESULT:
        return decoded(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if found and isinstance(found, (dict, list)) else text


def decoded(value: str) -> Any:
    """Return structured values as such: BuildKit sends descriptors as base64 of JSON."""
    try:
        found = json.loads(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return value
    return found if found and isinstance(found, (dict, list)) else value

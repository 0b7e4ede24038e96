"""--annotation: from buildx's form to attributes of BuildKit's exporters.

Sources: docker/buildx util/buildflags/export.go; BuildKit exporter/containerimage/exptypes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from offload_client.build.options import check_text, parse_platforms
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = ("index", "index-descriptor", "manifest", "manifest-descriptor")
_TYPE = re.compile(r"([a-z-]+)(?:\[([A-Za-z0-9_/-]+)\])?")


def parse_annotations(values: Sequence[str]) -> dict[str, str]:
    """Return attributes for image exporters from "[TYPE[PLATFORM],...:]KEY=VALUE".

    Raises:
        InvalidValueError: in buildx's words.
    """
    found: dict[str, str] = {}
    for text in filter(None, values):
        check_text("--annotation", text)
        name, mark, value = text.partition("=")
        if not mark:
            raise InvalidValueError(f'invalid annotation "{text}", expected key=value')
        types, colon, key = name.partition(":")
        if not colon:
            found[f"annotation.{name}"] = value
            continue
        for kind in types.split(","):
            found[f"{_prefix(kind)}.{key}"] = value
    return found


def _prefix(text: str) -> str:
    match = _TYPE.fullmatch(text)
    if match is None:
        raise InvalidValueError(
            f'invalid annotation type "{text}", expected type and optional platform in square '
            "brackets"
        )
    kind, platform = match[1], match[2]
    if kind not in TYPES:
        raise InvalidValueError(f'unknown annotation type "{kind}"')
    if not platform:
        return f"annotation-{kind}"
    (normal,) = parse_platforms([platform])
    # An index belongs to all platforms.
    return f"annotation-{kind}[{normal}]" if kind.startswith("manifest") else f"annotation-{kind}"

"""--attest, --provenance and --sbom: what is said about an image beside the image.

Source: docker/buildx util/buildflags/attests.go and build/opt.go.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from offload_client.build.options import check_text
from offload_client.goboolean import parse_boolean
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DISABLED = "disabled=true"
"""An attestation that is not wanted."""
NO_DEFAULT = "BUILDX_NO_DEFAULT_ATTESTATIONS"
_KINDS = ("provenance", "sbom")


def parse_attestations(
    attests: Sequence[str], provenance: str, sbom: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return attributes by type, in BuildKit's form; of one type, the first counts, as in buildx.

    Without any for provenance, the node decides as buildx does, unless the environment has
    BUILDX_NO_DEFAULT_ATTESTATIONS=1.

    Raises:
        InvalidValueError: a value cannot be understood.
    """
    found: dict[str, str] = {}
    texts = [*attests]
    texts += [_shorthand("provenance", provenance)] if provenance else []
    texts += [_shorthand("sbom", sbom)] if sbom else []
    for text in texts:
        kind, attributes = _parse(check_text("--attest", text))
        found.setdefault(kind, attributes)
    if "provenance" not in found and _without_default(environment):
        found["provenance"] = DISABLED
    return found


def _shorthand(kind: str, text: str) -> str:
    wanted = parse_boolean(text)
    if wanted is None:
        return f"type={kind},{text}"
    return f"type={kind},disabled={'false' if wanted else 'true'}"


def _parse(text: str) -> tuple[str, str]:
    try:
        fields = next(csv.reader(io.StringIO(text)), [])
    except csv.Error as error:
        raise InvalidValueError(f'invalid --attest "{text}": {error}') from error
    kind, disabled = "", False
    attributes: dict[str, str] = {}
    for field in fields:
        key, mark, value = field.partition("=")
        if not mark:
            raise InvalidValueError(f"invalid value {field}")
        name = key.strip().lower()
        if name == "type":
            kind = value
        elif name == "disabled":
            answer = parse_boolean(value)
            if answer is None:
                raise InvalidValueError(f"invalid value {field}")
            disabled = answer
        else:
            attributes[key] = value
    if not kind:
        raise InvalidValueError("attestation type not specified")
    if kind not in _KINDS:
        raise InvalidValueError(f'unknown attestation type "{kind}"; write provenance or sbom')
    if disabled:
        return kind, DISABLED
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(f"{k}={v}" for k, v in sorted(attributes.items()))
    return kind, line.getvalue() if attributes else ""


def _without_default(environment: Mapping[str, str]) -> bool:
    text = environment.get(NO_DEFAULT)
    if text is None:
        return False
    answer = parse_boolean(text)
    if answer is None:
        raise InvalidValueError(f'invalid {NO_DEFAULT}: "{text}" is not true or false')
    return answer

"""Provenance for the metadata file, in the form that buildx writes.

BuildKit records SLSA provenance v1; buildx writes v0.2, without the parts that make it large unless
they are asked for.
Sources: slsa.dev/provenance/v0.2 and /v1; BuildKit solver/llbsolver/provenance/types; docker/buildx
build/provenance.go.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.buildkit.solve import SolveResult
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.buildkit.failure import SolveFailure

log = structlog.get_logger(__name__)

KEY = "buildx.build.provenance"
PROVENANCE_SECONDS = 20.0
BUILD_TYPE = "https://mobyproject.org/buildkit@v1"
_PARAMETERS = ("buildConfig", "builderPlatform", "dockerfileVersion")


def metadata_entries(
    found: Mapping[str, bytes], mode: str, clean: Callable[[str], str]
) -> dict[str, str]:
    """Return entries for an exporter response from provenance by platform.

    Args:
        found: SLSA provenance v1 as JSON; "" is a build for one platform.
        mode: "min" or "max".
        clean: removes what nobody may see from a text.

    Raises:
        ValueError: it is not such JSON.
    """
    entries = {}
    for platform, data in found.items():
        predicate = as_slsa_02(json.loads(clean(data.decode())))
        if mode == "min":
            predicate.pop("buildConfig", None)
            predicate.pop("metadata", None)
        text = base64.b64encode(json.dumps(predicate).encode()).decode()
        entries[f"{KEY}/{platform}" if platform else KEY] = text
    return entries


def as_slsa_02(predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return a predicate of version 1 as one of version 0.2."""
    definition = predicate.get("buildDefinition", {})
    run = predicate.get("runDetails", {})
    external = definition.get("externalParameters", {})
    internal = definition.get("internalParameters", {})
    source = external.get("configSource", {})
    environment = {
        "platform": internal.get("builderPlatform", ""),
        "dockerfileVersion": internal.get("dockerfileVersion"),
        **{key: value for key, value in internal.items() if key not in _PARAMETERS},
    }
    converted: dict[str, Any] = {
        "builder": {"id": run.get("builder", {}).get("id", "")},
        "buildType": BUILD_TYPE,
        "materials": [
            _present({"uri": item.get("uri"), "digest": item.get("digest")})
            for item in definition.get("resolvedDependencies") or ()
        ],
        "invocation": {
            "configSource": _present(
                {
                    "uri": source.get("uri"),
                    "digest": source.get("digest"),
                    "entryPoint": source.get("path"),
                }
            ),
            "parameters": external.get("request", {}),
            "environment": _present(environment),
        },
    }
    if not converted["materials"]:
        del converted["materials"]
    if internal.get("buildConfig"):
        converted["buildConfig"] = internal["buildConfig"]
    if run.get("metadata") is not None:
        converted["metadata"] = _metadata(run["metadata"])
    return converted


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    complete = metadata.get("buildkit_completeness", {})
    found = {
        "buildInvocationID": metadata.get("invocationId") or metadata.get("invocationID"),
        "buildStartedOn": metadata.get("startedOn"),
        "buildFinishedOn": metadata.get("finishedOn"),
        "https://mobyproject.org/buildkit@v1#metadata": metadata.get("buildkit_metadata", {}),
        "https://mobyproject.org/buildkit@v1#hermetic": metadata.get("buildkit_hermetic") or None,
    }
    return _present(found) | {
        "completeness": {
            "parameters": bool(complete.get("request")),
            "environment": True,
            "materials": bool(complete.get("resolvedDependencies")),
        },
        "reproducible": bool(metadata.get("buildkit_reproducible")),
    }


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


async def note_provenance(
    client: BuildkitClient,
    ref: str,
    outcome: SolveResult | SolveFailure,
    mode: str,
    clean: Callable[[str], str],
) -> bool:
    """Take what the client's metadata file is to have; the build has worked without it, too.

    Args:
        client: to BuildKit, which forgets its record of the build.
        ref: of the build.
        outcome: gets the entries.
        mode: how much is wanted.
        clean: makes a text readable.

    Returns:
        Whether it could be read.
    """
    try:
        async with asyncio.timeout(PROVENANCE_SECONDS):
            found = await client.take_provenance(ref)
        if isinstance(outcome, SolveResult):
            outcome.exporter_response.update(metadata_entries(found, mode, clean))
    except (OffloadError, TimeoutError, ValueError) as error:
        log.warning("build.provenance.failed", ref=ref, reason=str(error))
        return False
    return True

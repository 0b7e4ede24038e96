"""What each leg is asked for, so that the parts of a build can be joined at the end."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_client.build.options import OutputOption
from offload_client.goboolean import parse_boolean
from offload_core.errors import InvalidValueError
from offload_core.reference import normalise_reference, split_reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from offload_client.build.options import BuildOptions

BY_DIGEST = "push-by-digest"
INSECURE = "registry.insecure"
ARCHIVES = ("tar", "oci")
"""Outputs that are one file, which no leg can write alone."""
_OF_PLATFORM = re.compile(r"annotation(?:-[a-z-]+)?\[([^\]]+)\]\..*", re.DOTALL)
_OVERWRITTEN = ("registry", "local", "s3", "gha", "azblob")


def check_legs(options: BuildOptions, outputs: Sequence[OutputOption]) -> None:
    """Refuse what several nodes cannot do together.

    Raises:
        InvalidValueError: with what to do instead.
    """
    if options.detach:
        raise InvalidValueError(
            "--detach cannot be used here: several nodes build these platforms, and this command "
            "joins their images at the end",
            hint="build each platform with a command of its own, or without --detach",
        )
    pushes = [output for output in outputs if output.type == "registry"]
    if len(pushes) > 1:
        raise InvalidValueError(
            "several nodes build these platforms, and they push in one way only",
            hint="give one output of type registry, with all names as tags",
        )
    if any(parse_boolean(output.attributes.get(BY_DIGEST, "")) for output in pushes):
        raise InvalidValueError(
            f"{BY_DIGEST} cannot be used here: several nodes build these platforms, and only a tag "
            "names their images together",
            hint="push under a tag, or build each platform with a command of its own",
        )


def leg_warning(options: BuildOptions) -> str:
    """Return what of the command line works otherwise on several nodes; empty for nothing."""
    kinds = dict.fromkeys(item.type for item in options.caches.exports)
    found = [f"--cache-to type={kind}" for kind in kinds if kind in _OVERWRITTEN]
    if not found:
        return ""
    return (
        f"several nodes build these platforms, and each writes its own steps to {found[0]}: what "
        "is written last stays; the pool's own cache keeps all of them"
    )


def push_names(options: BuildOptions, output: OutputOption) -> list[str]:
    """Return the names under which an output is pushed, normalised; tags go before its own."""
    own = [normalise_reference(name) for name in _split(output.attributes.get("name", ""))]
    return list(dict.fromkeys(options.tags or own))


def leg_options(options: BuildOptions, platforms: Sequence[str]) -> BuildOptions:
    """Return the options of one leg: without what is done once, for all legs together."""
    return replace(
        options,
        platforms=list(platforms),
        # Names are given with each output: what is pushed gets its tags at the end.
        tags=(),
        iidfile="",
        annotations=_of_leg(options.annotations, platforms),
    )


def leg_outputs(
    options: BuildOptions, outputs: Sequence[OutputOption], platforms: Sequence[str], folder: Path
) -> list[OutputOption]:
    """Return the outputs of one leg.

    The push comes last: of several exporters, BuildKit answers with the digest of the last one.

    Args:
        options: of the whole build.
        outputs: of the whole build, the effective ones.
        platforms: of the leg.
        folder: of the leg alone; archives go there, named by the number of their output.
    """
    found: list[OutputOption] = []
    for number, output in enumerate(outputs):
        attributes = dict(_of_leg(output.attributes, platforms))
        names = push_names(options, output)
        if output.type in ARCHIVES:
            if output.type == "oci" and names:
                attributes["name"] = ",".join(names)
            found.append(replace(output, dest=str(archive(folder, number)), attributes=attributes))
        elif output.type == "registry":
            repositories = ["/".join(split_reference(name)[:2]) for name in names]
            attributes["name"] = ",".join(dict.fromkeys(repositories))
            attributes[BY_DIGEST] = "true"
            found.append(OutputOption("registry", "", attributes))
        else:
            found.append(replace(output, attributes=attributes, load=False))
    return sorted(found, key=lambda output: output.type == "registry")


def archive(folder: Path, number: int) -> Path:
    """Return where a leg leaves an archive.

    Args:
        folder: of the leg.
        number: of the output.
    """
    return folder / f"{number}.tar"


def _of_leg(attributes: Mapping[str, str], platforms: Sequence[str]) -> dict[str, str]:
    """Leave out annotations for platforms of other legs: BuildKit refuses them."""
    found = {}
    for key, value in attributes.items():
        match = _OF_PLATFORM.fullmatch(key)
        if match is None or match[1] in platforms:
            found[key] = value
    return found


def _split(text: str) -> list[str]:
    return [name for name in text.split(",") if name]

"""What the command line of `offload-build` says, checked, with docker's meanings."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_client.build.cacheoptions import CacheOptions
from offload_client.build.stepoptions import StepOptions
from offload_client.goboolean import parse_boolean
from offload_core.errors import InvalidValueError
from offload_core.reference import (
    familiar_reference,
    normalise_reference,
    split_reference,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.build.callrequest import CallRequest
    from offload_client.build.networkpolicy import PolicyFile
    from offload_client.build.secretoptions import AgentOption, SecretOption

ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "i386": "386",
    "aarch64": "arm64",
    "armhf": "arm/v7",
    "armel": "arm/v6",
    "armv7l": "arm/v7",
}
SYSTEMS = {"macos": "darwin"}
VARIANTS = {"amd64/v1": "amd64", "arm64/v8": "arm64", "arm": "arm/v7"}
"""The variant that an architecture has when none is named, and how BuildKit writes it."""
_PLATFORM_PART = re.compile(r"[a-z0-9_.-]+")
_DIGEST = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-fA-F]{32,}")
EPOCH = "SOURCE_DATE_EPOCH"
"""Seconds since 1970 that a reproducible build puts everywhere instead of the present time.

Source: reproducible-builds.org, "SOURCE_DATE_EPOCH".
"""
OUTPUT_TYPES = ("local", "tar", "oci", "docker", "image", "registry", "cacheonly")


@dataclass(frozen=True)
class OutputOption:
    """One -o/--output, --load or --push."""

    type: str
    dest: str = ""
    """File or directory at the client; "-" for standard output; empty for none."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    load: bool = False
    """The image goes into the local container engine."""


@dataclass(frozen=True)
class BuildOptions:
    """One build as the user asked for it."""

    path: str
    tags: Sequence[str] = ()
    file: str = ""
    dockerfile_inline: str | None = None
    """Content of the Dockerfile, which is then no file."""
    target: str = ""
    build_args: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    platforms: Sequence[str] = ()
    no_cache: bool = False
    pull: bool = False
    progress: str = "auto"
    quiet: bool = False
    """Print the image id and nothing else."""
    outputs: Sequence[OutputOption] = ()
    contexts: Mapping[str, str] = field(default_factory=dict)
    """--build-context: what each named context is, as it was given."""
    caches: CacheOptions = field(default_factory=CacheOptions)
    annotations: Mapping[str, str] = field(default_factory=dict)
    """--annotation, as attributes of image exporters."""
    attestations: Mapping[str, str] = field(default_factory=dict)
    """--attest, --provenance and --sbom, as `parse_attestations` returns them."""
    call: CallRequest | None = None
    """--call and --check: what is asked instead of building."""
    no_cache_stages: Sequence[str] = ()
    """--no-cache-filter."""
    steps: StepOptions = field(default_factory=StepOptions)
    debug: bool = False
    """--debug: tell details, of warnings too."""
    remarks: Sequence[str] = ()
    """What to warn of before building, for example a flag that docker deprecates."""
    metadata_file: str = ""
    summary_file: str = ""
    """--summary-file; empty for what the environment says, "none" for none."""
    result_file: str = ""
    network_report: bool = False
    """Tell at the end what was reached in the network."""
    network_report_file: str = ""
    iidfile: str = ""
    secrets: Sequence[SecretOption] = ()
    agents: Sequence[AgentOption] = ()
    """--ssh."""
    entitlements: Sequence[str] = ()
    """--allow."""
    network_policy: str = ""
    """--network-policy: a file, or "none"; empty for what pool and project allow."""
    policy_file: PolicyFile | None = None
    """What it says, once it is read."""
    detach: bool = False
    """Leave as soon as the build goes on by itself."""
    save: bool = False
    """The image outlives the node's disk."""
    gateway: str | None = None
    project: str | None = None


def parse_output(text: str) -> OutputOption:
    """Return the meaning of one --output value, as buildx reads it: CSV of key=value, or a path.

    Raises:
        InvalidValueError: with the value and what is allowed.
    """
    try:
        fields = next(csv.reader(io.StringIO(text)), [])
    except csv.Error as error:
        raise _bad_output(text, f"it is not a list of KEY=VALUE ({error})") from error
    if not fields or not any(fields):
        raise InvalidValueError("--output needs a value, for example type=local,dest=out")
    if len(fields) == 1 and fields[0] == text and not text.startswith("type="):
        return OutputOption("tar", "-") if text == "-" else OutputOption("local", text)
    values: dict[str, str] = {}
    for part in fields:
        key, equals, value = part.partition("=")
        if not equals:
            raise _bad_output(text, f'"{part}" is not KEY=VALUE')
        values[check_text("--output", key.strip().lower())] = value
    kind = values.pop("type", "")
    dest = values.pop("dest", "")
    for value in values.values():
        check_text("--output", value)
    if not kind:
        raise _bad_output(text, "type is required for output")
    if kind not in OUTPUT_TYPES:
        raise _bad_output(text, f"type must be one of {', '.join(OUTPUT_TYPES)}")
    return _checked_output(text, kind, dest, values)


def check_iidfile(path: str, outputs: Sequence[OutputOption]) -> str:
    """Return the value of --iidfile.

    Raises:
        InvalidValueError: an output is no image, so there would be no id.
    """
    if path and any(output.type in ("local", "tar") for output in outputs):
        raise InvalidValueError("local and tar exporters are incompatible with image ID file")
    return path


def _bad_output(text: str, problem: str) -> InvalidValueError:
    return InvalidValueError(f'invalid --output "{text}": {problem}')


def _checked_output(text: str, kind: str, dest: str, values: dict[str, str]) -> OutputOption:
    if kind == "local" and not dest:
        raise _bad_output(text, "dest is required for type=local")
    if kind == "local" and "platform-split" in values:
        raise _bad_output(
            text, "platform-split is not supported; several platforms are always split, one never"
        )
    if kind == "local" and dest == "-":
        raise _bad_output(text, "dest cannot be stdout for type=local")
    if kind in ("tar", "oci"):
        dest = dest or "-"
    if kind in ("image", "registry", "cacheonly") and dest:
        raise _bad_output(text, f"dest is not supported by type={kind}")
    if kind in ("oci", "docker") and not _boolean(text, "tar", values.get("tar", "true")):
        raise _bad_output(text, "tar=false is not supported yet; unpack the archive instead")
    if values.get("name"):
        check_tags(values["name"].split(","))
    if kind == "docker" and not dest:
        return OutputOption("image", "", values, load=True)
    if kind == "image" and _boolean(text, "push", values.pop("push", "false")):
        kind = "registry"
    return OutputOption(kind, dest, values)


def _boolean(text: str, key: str, value: str) -> bool:
    found = parse_boolean(value)
    if found is None:
        raise _bad_output(text, f'{key} is true or false, not "{value}"')
    return found


def parse_build_args(values: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return --build-arg values; a NAME without "=" is taken from the environment, if set there.

    As buildx does, the variable SOURCE_DATE_EPOCH of the environment is passed on unasked.

    Raises:
        InvalidValueError: a name is missing, or a value is no text.
    """
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = _pair(text)
        if equals:
            pairs[name] = value
        elif name in environment:
            pairs[name] = check_text(f"the build argument {name}", environment[name])
    if environment.get(EPOCH):
        pairs.setdefault(EPOCH, check_text(f"the variable {EPOCH}", environment[EPOCH]))
    return pairs


def parse_labels(values: Sequence[str]) -> dict[str, str]:
    """Return --label values.

    Raises:
        InvalidValueError: a name is missing, or a value is no text.
    """
    return {name: value for name, _, value in map(_pair, values)}


def _pair(text: str) -> tuple[str, str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise InvalidValueError(f'invalid key-value pair "{text}": empty key')
    check_text(f'"{name}"', text)
    return name, equals, value


def parse_build_contexts(values: Sequence[str]) -> dict[str, str]:
    """Return --build-context values by name; of one name, the last counts.

    A name is that of an image, in docker's short form: `FROM docker.io/library/alpine:latest` and
    `COPY --from=alpine` mean the same context "alpine".

    Raises:
        InvalidValueError: a value is not NAME=VALUE, or the name is none.
    """
    found: dict[str, str] = {}
    for text in values:
        if not text:
            continue
        name, equals, value = text.partition("=")
        check_text("--build-context", text)
        if not equals:
            raise InvalidValueError(f"invalid context value: {text}, expected key=value")
        found[_context_name(name)] = value
    return found


def _context_name(text: str) -> str:
    name, at, digest = text.partition("@")
    try:
        registry, path, tag = split_reference(name)
    except InvalidValueError as error:
        why = error.message.partition(": ")[2]
        raise InvalidValueError(f"invalid context name {text}: {why}") from error
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidValueError(f"invalid context name {text}: invalid reference format")
    short = familiar_reference(f"{registry}/{path}:{tag}").removesuffix(":latest")
    return f"{short}{at}{digest}"


def parse_platforms(values: Sequence[str]) -> list[str]:
    """Return platforms in BuildKit's form from "linux/amd64,arm64" and the like.

    "local" is the platform of this machine. Source: containerd's platforms package.

    Raises:
        InvalidValueError: not a platform.
    """
    found: list[str] = []
    for text in (part.strip() for value in values for part in value.split(",")):
        parts = text.lower().split("/")
        if len(parts) > 3 or not all(_PLATFORM_PART.fullmatch(part) for part in parts):
            raise InvalidValueError(f'invalid platform "{text}"; write for example linux/amd64')
        if parts == ["local"]:
            parts = ["linux", os.uname().machine.lower()]
        if len(parts) == 1:
            parts = ["linux", *parts]
        system = SYSTEMS.get(parts[0], parts[0])
        architecture = ARCHITECTURES.get(parts[1], parts[1])
        if len(parts) == 3:
            architecture = architecture.partition("/")[0]
        platform = "/".join([system, architecture, *parts[2:]])
        for suffix, instead in VARIANTS.items():
            if platform.endswith(f"/{suffix}"):
                platform = platform.removesuffix(suffix) + instead
        if platform not in found:
            found.append(platform)
    return found


def own_platform() -> str:
    """Return the platform of images that run on this machine."""
    return parse_platforms(["local"])[0]


def check_tags(values: Sequence[str]) -> list[str]:
    """Return normalised image names, each once.

    Raises:
        InvalidValueError: docker would refuse one.
    """
    return list(dict.fromkeys(normalise_reference(value) for value in values))


def check_text(what: str, text: str) -> str:
    """Return a text that can travel.

    Raises:
        InvalidValueError: it has bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(f"{what} has bytes that are not UTF-8") from None
    return text

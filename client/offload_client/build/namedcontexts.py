"""--build-context: what each named context is, with docker buildx's meanings.

Source: buildx's build/opt.go, loadInputs.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_client.build.dockerfile import ignore_file
from offload_client.build.remotecontext import check_remote, is_remote, refuse_windows_path
from offload_client.context.source import DirectorySource
from offload_core.contextnames import layout_source_name, local_source_name
from offload_core.errors import ContextError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offload_client.context.source import ContextSource
    from offload_client.invocation import Invocation
    from offload_proto.v1.node_service_pb2 import InlineFile

_IMAGE = "docker-image://"
_LAYOUT = "oci-layout://"
_TARGET = "target:"


@dataclass
class NamedContexts:
    """The named contexts of one build."""

    values: dict[str, str] = field(default_factory=dict)
    """By name, as the node takes them."""
    sources: dict[str, ContextSource] = field(default_factory=dict)
    """Those that are on this machine, by local name."""
    inline: list[InlineFile] = field(default_factory=list)
    """Their ignore files."""


def find_named_contexts(
    invocation: Invocation, given: Mapping[str, str], index: Path | None
) -> NamedContexts:
    """Locate what --build-context names.

    Args:
        invocation: for relative paths.
        given: values by name.
        index: the stat index of directories; None for none.

    Raises:
        ContextError: a directory or layout cannot be read.
        InvalidValueError: a form that is not supported.
    """
    found = NamedContexts()
    for name, value in given.items():
        if value.startswith(_TARGET):
            raise InvalidValueError(
                f"failed to find {value.replace(':', ' ', 1)} for context {name}",
                hint="only targets of a bake file can be named so",
            )
        if is_remote(value):
            found.values[name] = check_remote(value, f"the build context {name}")
        elif value.startswith(_IMAGE):
            found.values[name] = value
        elif value.startswith(_LAYOUT):
            _add_layout(found, invocation, name, value, index)
        else:
            _add_directory(found, invocation, name, value, index)
    return found


def _add_layout(
    found: NamedContexts, invocation: Invocation, name: str, value: str, index: Path | None
) -> None:
    from offload_client.context.ocilayout import LayoutReference, LayoutSource, find_image

    text = value.removeprefix(_LAYOUT)
    refuse_windows_path(invocation, text, f"the build context {name}")
    reference = LayoutReference(text)
    layout = invocation.path(reference.path)
    try:
        digest = find_image(layout, reference)
    except ContextError as error:
        raise ContextError(
            f'oci-layout reference "{value}" could not be resolved: {error.message}'
        ) from error
    directory = DirectorySource(layout, index_path=index)
    found.sources[layout_source_name(name)] = LayoutSource(directory, layout, digest)
    found.values[name] = f"{_LAYOUT}{name}@{digest}"


def _add_directory(
    found: NamedContexts, invocation: Invocation, name: str, value: str, index: Path | None
) -> None:
    refuse_windows_path(invocation, value, f"the build context {name}")
    root = invocation.path(value)
    try:
        if not value:
            raise FileNotFoundError(2, "No such file or directory")
        mode = root.stat().st_mode
    except OSError as error:
        raise ContextError(
            f"failed to get build context {name}: stat {value}: {(error.strerror or '').lower()}"
        ) from error
    if not stat.S_ISDIR(mode):
        raise ContextError(f"failed to get build context path {value}: not a directory")
    local_name = local_source_name(name)
    found.sources[local_name] = DirectorySource(root, index_path=index)
    found.inline += ignore_file(root, local_name)
    found.values[name] = f"local:{local_name}"

"""From the fields of a target to the options of a build: through the flags of the command line.

So a field means what its flag means, and a flag that is added to `offload-build` needs one line
here.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offload_client.bake.entries import ENTRY_FIELDS, entry_text
from offload_client.bake.plan import TARGET
from offload_client.build.remotecontext import is_http_url, is_remote
from offload_core.errors import BakeError, InvalidValueError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from offload_client.bake.request import BakeRequest
    from offload_client.build.options import BuildOptions

FLAGS = {
    "target": "--target",
    "tags": "--tag",
    "platforms": "--platform",
    "args": "--build-arg",
    "labels": "--label",
    "annotations": "--annotation",
    "contexts": "--build-context",
    "cache-from": "--cache-from",
    "cache-to": "--cache-to",
    "output": "--output",
    "attest": "--attest",
    "secret": "--secret",
    "ssh": "--ssh",
    "pull": "--pull",
    "no-cache": "--no-cache",
    "no-cache-filter": "--no-cache-filter",
    "network": "--network",
    "shm-size": "--shm-size",
    "ulimits": "--ulimit",
    "extra-hosts": "--add-host",
    "entitlements": "--allow",
    "call": "--call",
}
"""The flag of `offload-build` that each field of a target stands for."""
PERMISSIONS = ("network.host", "security.insecure", "device")
"""Entitlements that a bake file gets only with --allow."""
OTHER_PERMISSIONS = ("fs", "fs.read", "fs.write", "ssh", "image.output", "network")
"""Values of --allow that buildx knows and that nothing here depends on."""
_OWN_FIELDS = frozenset(("context", "dockerfile", "dockerfile-inline", "description"))
_LOCAL = "cwd://"


@dataclass(frozen=True)
class FlagParser:
    """How a command line of `offload-build` is read.

    Attributes:
        flags: those that there are.
        parse: returns the options of a command line.
    """

    flags: Collection[str]
    parse: Callable[[Sequence[str]], BuildOptions]


def target_options(
    name: str, fields: Mapping[str, Any], request: BakeRequest, parser: FlagParser
) -> BuildOptions:
    """Return how a target is built; contexts that are other targets are left out.

    Raises:
        BakeError: a field is not supported, or needs a permission that was not given.
        OffloadError: a value is wrong; the sentence names the target.
    """
    _check_permissions(name, fields.get("entitlements") or (), request.allow)
    arguments = []
    for flag, given in (
        ("--gateway", request.gateway),
        ("--project", request.project),
        ("--metadata-file", request.metadata_file),
        ("--network-policy", request.network_policy),
    ):
        if given:
            arguments.append(f"{flag}={given}")
    path = (fields.get("context") or ".").removeprefix(_LOCAL) or "."
    inline = fields.get("dockerfile-inline")
    if path == "-":
        raise BakeError(f"target {name}: a context on standard input is not supported by bake")
    if inline is None:
        arguments.append(f"--file={_dockerfile(path, fields.get('dockerfile') or 'Dockerfile')}")
    for field, value in fields.items():
        if field in _OWN_FIELDS or value is None:
            continue
        if FLAGS.get(field) not in parser.flags:
            raise BakeError(f'target {name}: the field "{field}" is not supported yet')
        arguments += [f"{FLAGS[field]}={text}" for text in _texts(field, value)]
    try:
        options = parser.parse([*arguments, "--", path])
    except OffloadError as error:
        error.args = (f"target {name}: {error.message}",)
        raise
    return options if inline is None else replace(options, dockerfile_inline=inline)


def _dockerfile(context: str, given: str) -> str:
    """Return a Dockerfile's path; bake takes it as relative to the context."""
    if given.startswith(_LOCAL):
        return given.removeprefix(_LOCAL)
    if is_remote(context) or is_http_url(given) or given.startswith("/"):
        return given
    return posixpath.normpath(posixpath.join(context, given))


def _texts(field: str, value: Any) -> list[str]:
    """Return the values of a flag."""
    if field in ENTRY_FIELDS:
        return [entry_text(field, entry) for entry in value]
    if field == "contexts":
        return [f"{key}={item}" for key, item in value.items() if not item.startswith(TARGET)]
    if isinstance(value, dict):
        # A value that is not set stays what it is without it, as in buildx.
        joined = ":" if field == "extra-hosts" else "="
        return [f"{key}{joined}{item}" for key, item in value.items() if item is not None]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _check_permissions(name: str, wanted: Sequence[str], allowed: Sequence[str]) -> None:
    for entitlement in wanted:
        kind = entitlement.partition("=")[0]
        if kind in PERMISSIONS and entitlement not in allowed and kind not in allowed:
            raise BakeError(
                f'target {name} wants the entitlement "{entitlement}", which a bake file does not '
                "get by itself",
                hint=f"add --allow {entitlement}",
            )


def check_allow(values: Sequence[str]) -> None:
    """Refuse values of --allow that docker buildx refuses.

    Raises:
        InvalidValueError: with the value.
    """
    for value in values:
        kind = value.partition("=")[0]
        if kind not in (*PERMISSIONS, *OTHER_PERMISSIONS):
            raise InvalidValueError(f'invalid --allow "{value}": there is no such entitlement')

"""What a BuildKit client's request asks for in our terms, and what BuildKit is asked instead. Pure.

The pool's cache is a kind of its own, "offload", as with our own command; "none" turns it off.
Branches come in build arguments, which never reach BuildKit, as its clients know no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.buildkit.controlapi import named_imports
from offload_builder.node.cacheplan import MAX_CACHES, check_cache
from offload_builder.node.flagplan import check_flags, flag_attributes
from offload_builder.node.steplimits import resource_attributes
from offload_core.devices import wanted_devices
from offload_core.errors import UsageError
from offload_proto.v1.build_spec_pb2 import BuildSpec
from offload_proto.v1.builds_service_pb2 import CacheChoice, CreateRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sized

    from offload_builder.buildkit.controlapi import SolveOrder
    from offload_builder.buildkit.solve import Attributed
    from offload_builder.node.steplimits import StepBounds

POOL = "offload"
OFF = "none"
BRANCH = "build-arg:OFFLOAD_BRANCH"
TARGET_BRANCH = "build-arg:OFFLOAD_TARGET_BRANCH"
CACHE_SCOPE = "build-arg:OFFLOAD_CACHE_SCOPE"
NETWORK_POLICY = "build-arg:OFFLOAD_NETWORK_POLICY"
"""Refused: whoever asks for it must not believe to have it."""
OUR_ARGUMENTS = (BRANCH, TARGET_BRANCH, CACHE_SCOPE)
_BOUNDS = {
    "memory": "memory_bytes",
    "memswap": "memory_swap_bytes",
    "cpushares": "cpu_shares",
    "cpuperiod": "cpu_period",
    "cpuquota": "cpu_quota",
}
_BUILD_ARGUMENT = "build-arg:"
MAX_PARAMETERS = 1 << 20
"""Characters of all names and values; the request itself may have 16 MiB of LLB."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A request of a BuildKit client in our terms.

    Attributes:
        create: for the gateway; without project and identifier.
        spec: for the node: what its checks and the record of the build need.
        imports: caches beside the pool's to read.
        exports: caches beside the pool's to write.
        asks_client: the client's own session is to be asked about sources.
    """

    create: CreateRequest
    spec: BuildSpec
    imports: tuple[Attributed, ...]
    exports: tuple[Attributed, ...]
    asks_client: bool = False


def wish_of(order: SolveOrder, client: str) -> Wish:
    """Return what a solve asks for.

    Args:
        order: the request.
        client: program that asks, for example "buildx".

    Raises:
        UsageError: it asks for something that cannot be had.
    """
    if order.policy_session not in ("", order.session):
        raise UsageError("the session that is asked about sources has to be the build's own")
    attributes = order.attributes
    _check_size(attributes)
    if NETWORK_POLICY in attributes:
        raise UsageError(
            "OFFLOAD_NETWORK_POLICY is for offload-build: other clients are connected to a "
            "BuildKit before they say what they build, and one BuildKit has one policy"
        )
    choice = CacheChoice(scope=attributes.get(CACHE_SCOPE, ""))
    imports = _imports((*order.cache_imports, *named_imports(attributes)), choice)
    exports = _exports(order.cache_exports, choice)
    platforms = [item for item in attributes.get("platform", "").split(",") if item]
    definition = attributes.get("filename", "")
    if order.frontend or attributes:
        definition = definition or "Dockerfile"
    spec = BuildSpec(
        dockerfile_path=definition,
        target=attributes.get("target", ""),
        platforms=platforms,
        no_cache=attributes.get("no-cache") == "",
        entitlements=order.entitlements,
        network_mode=attributes.get("force-network-mode", ""),
        cgroup_parent=attributes.get("cgroup-parent", ""),
        build_args={
            key.removeprefix(_BUILD_ARGUMENT): value
            for key, value in attributes.items()
            if key.startswith(_BUILD_ARGUMENT) and key not in OUR_ARGUMENTS
        },
    )
    _read_bounds(spec, attributes)
    for item in imports:
        spec.cache_imports.add(type=item.type, attributes=item.attributes)
    check_flags(spec)
    create = CreateRequest(
        platforms=platforms,
        name=_name(order),
        dockerfile_path=definition,
        target=spec.target,
        vcs_branch=attributes.get(BRANCH, ""),
        vcs_target_branch=attributes.get(TARGET_BRANCH, ""),
        vcs_revision=attributes.get("vcs:revision", ""),
        cache=choice,
        client=client,
        devices=wanted_devices(order.entitlements),
    )
    return Wish(create, spec, tuple(imports), tuple(exports), bool(order.policy_session))


def bounded(attributes: Mapping[str, str], bounds: StepBounds) -> dict[str, str]:
    """Return frontend parameters within what the node permits, without those that are ours.

    Raises:
        UsageError: a value is wrong, or asks for more than there is.
    """
    _check_size(attributes)
    spec = BuildSpec(cgroup_parent=attributes.get("cgroup-parent", ""))
    _read_bounds(spec, attributes)
    check_flags(spec)
    found = {key: value for key, value in attributes.items() if key not in OUR_ARGUMENTS}
    found |= resource_attributes(spec.resources, bounds)
    if spec.cgroup_parent:
        found["cgroup-parent"] = flag_attributes(spec)["cgroup-parent"]
    return found


def _read_bounds(spec: BuildSpec, attributes: Mapping[str, str]) -> None:
    for name, field in _BOUNDS.items():
        text = attributes.get(name, "")
        if not text:
            continue
        try:
            setattr(spec.resources, field, int(text))
        except ValueError:
            raise UsageError(f"the bound {name}={text[:40]} of a step is no number") from None
    spec.resources.cpuset_cpus = attributes.get("cpusetcpus", "")
    spec.resources.cpuset_mems = attributes.get("cpusetmems", "")


def _name(order: SolveOrder) -> str:
    """Return what the build is called in lists: its first image, else its target."""
    for exporter in order.exporters:
        names = exporter.attributes.get("name", "")
        if names:
            return names.partition(",")[0]
    named = order.attributes.get("target", "") or order.attributes.get("filename", "")
    return named or ("internal" if order.internal else "")


def _imports(entries: Iterable[Attributed], choice: CacheChoice) -> list[Attributed]:
    found: list[Attributed] = []
    for entry in entries:
        if entry.type == OFF:
            choice.read_off = True
        elif entry.type == POOL:
            scope = entry.attributes.get("scope", "")
            if scope and scope not in choice.read_scopes:
                choice.read_scopes.append(scope)
                _few(choice.read_scopes)
        elif entry not in found:
            check_cache(entry.type, entry.attributes)
            found.append(entry)
            # At once: each further one is compared with all before.
            _few(found)
    if choice.read_off and choice.read_scopes:
        raise UsageError(
            "--cache-from type=none and type=offload contradict each other; leave one out"
        )
    return found


def _exports(entries: Iterable[Attributed], choice: CacheChoice) -> list[Attributed]:
    found: list[Attributed] = []
    for entry in entries:
        if entry.type == OFF:
            choice.write_off = True
        elif entry.type != POOL:
            check_cache(entry.type, entry.attributes)
            found.append(entry)
            _few(found)
    return found


def _few(entries: Sized) -> None:
    if len(entries) > MAX_CACHES:
        raise UsageError(f"a build may read and write {MAX_CACHES} caches beside the pool's")


def _check_size(attributes: Mapping[str, str]) -> None:
    """Refuse parameters that would keep the node from its work while they are looked at."""
    if sum(len(key) + len(value) for key, value in attributes.items()) > MAX_PARAMETERS:
        raise UsageError(
            f"the parameters of a build have more than {MAX_PARAMETERS} characters together"
        )

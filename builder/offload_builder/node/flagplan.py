"""Flags for steps, attestations and calls: checked, and as BuildKit's frontend takes them. Pure.

Attribute names are those of BuildKit's frontend/dockerui (config.go, attr.go, requests.go) and
frontend/attestations.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from offload_core.errors import UsageError
from offload_proto.v1.build_spec_pb2 import Output

if TYPE_CHECKING:
    from offload_proto.v1.build_spec_pb2 import BuildSpec

DEFAULT_PROVENANCE = "mode=min,inline-only=true"
"""What buildx asks for unasked; it comes with pushed images and with nothing else."""
DISABLED = "disabled=true"
SUBREQUESTS = "moby.buildkit.frontend.subrequests+forward"
"""A frontend that is too old for calls says so, and does not build instead."""
CGROUP_ROOT = "offload"
MAX_VALUE_CHARACTERS = 4096
MAX_ITEMS = 256
_HOST = re.compile(r"[^\s=,\x00-\x1f\x7f]{1,255}")
_ULIMIT = re.compile(r"[a-z]{1,16}=-?[0-9]{1,18}:-?[0-9]{1,18}")
_CPUSET = re.compile(r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*")
_CGROUP = re.compile(r"/*[A-Za-z0-9_][A-Za-z0-9_.:-]*(?:/+[A-Za-z0-9_][A-Za-z0-9_.:-]*)*/*")
_CALL = re.compile(r"frontend\.[a-z0-9._-]{1,64}")
_ATTESTATIONS = ("provenance", "sbom")
_BOUNDS = {
    "memory": "memory_bytes",
    "memswap": "memory_swap_bytes",
    "cpushares": "cpu_shares",
    "cpuperiod": "cpu_period",
    "cpuquota": "cpu_quota",
    "cpusetcpus": "cpuset_cpus",
    "cpusetmems": "cpuset_mems",
}


def check_flags(spec: BuildSpec) -> None:
    """Refuse values that a request may not have.

    Raises:
        UsageError: with the flag and the reason.
    """
    _check_steps(spec)
    _check_resources(spec)
    _check_cgroup(spec.cgroup_parent)
    _check_attestations(spec)
    for stage in spec.no_cache_stages:
        if not stage or "," in stage or len(stage) > MAX_VALUE_CHARACTERS:
            raise UsageError(f"bad name of an uncached stage: {stage[:80]!r}")
    if spec.no_cache and spec.no_cache_stages:
        raise UsageError("--no-cache and --no-cache-filter cannot be used together")
    if spec.call and not _CALL.fullmatch(spec.call):
        raise UsageError(f"bad name of a call: {spec.call[:80]!r}")
    if spec.metadata_provenance not in ("", "min", "max"):
        raise UsageError("the provenance for the metadata file is min or max")


def _check_steps(spec: BuildSpec) -> None:
    lists = (spec.extra_hosts, spec.ulimits, spec.no_cache_stages)
    if max(map(len, lists)) > MAX_ITEMS:
        raise UsageError(f"a build may have {MAX_ITEMS} hosts, ulimits and uncached stages each")
    for host in spec.extra_hosts:
        name, _, address = host.partition("=")
        if not _HOST.fullmatch(name) or not _is_address(address):
            raise UsageError(f"invalid host {host[:80]!r}")
    for ulimit in spec.ulimits:
        if not _ULIMIT.fullmatch(ulimit):
            raise UsageError(f"invalid ulimit {ulimit[:80]!r}")
    if spec.network_mode not in ("", "default", "none", "host"):
        raise UsageError(f"network mode {spec.network_mode[:40]!r} is not supported")
    if spec.shm_size_bytes < 0:
        raise UsageError("the size of shared memory cannot be negative")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_resources(spec: BuildSpec) -> None:
    bounds = spec.resources
    numbers = (bounds.memory_bytes, bounds.cpu_shares, bounds.cpu_quota, bounds.cpu_period)
    if min(numbers) < 0 or bounds.memory_swap_bytes < -1:
        raise UsageError("a bound of --resource cannot be negative")
    for text in (bounds.cpuset_cpus, bounds.cpuset_mems):
        if text and (len(text) > MAX_VALUE_CHARACTERS or not _CPUSET.fullmatch(text)):
            raise UsageError(f"bad set of processors or memory nodes: {text[:80]!r}")


def _check_cgroup(text: str) -> None:
    if text and (len(text) > 255 or not _CGROUP.fullmatch(text)):
        raise UsageError(f"bad name of a parent cgroup: {text[:80]!r}")


def _check_attestations(spec: BuildSpec) -> None:
    for kind, attributes in spec.attestations.items():
        if kind not in _ATTESTATIONS:
            raise UsageError(f"this node does not know the attestation {kind[:40]!r}")
        if len(attributes) > MAX_VALUE_CHARACTERS:
            raise UsageError(f"the attributes of the attestation {kind} are too long")


def flag_attributes(spec: BuildSpec, *, use_cache: bool = True) -> dict[str, str]:
    """Return the frontend attributes of a checked request for all of these flags.

    Args:
        spec: the request.
        use_cache: False forgets --no-cache-filter, for a solve that exports what was just built.
    """
    found = {
        "add-hosts": ",".join(spec.extra_hosts),
        "ulimit": ",".join(spec.ulimits),
        "force-network-mode": spec.network_mode.replace("default", ""),
        "shm-size": str(spec.shm_size_bytes or ""),
        "no-cache": ",".join(spec.no_cache_stages) if use_cache else "",
    }
    for name, field in _BOUNDS.items():
        found[name] = str(getattr(spec.resources, field) or "")
    if spec.cgroup_parent:
        # Below a group of ours: a request must not put its steps beside the machine's services.
        found["cgroup-parent"] = f"/{CGROUP_ROOT}/{spec.cgroup_parent.strip('/')}"
    return {name: value for name, value in found.items() if value}


def attestation_attributes(spec: BuildSpec) -> dict[str, str]:
    """Return the frontend attributes for attestations.

    Without a word about provenance, a build that pushes has it as with buildx. It would change
    nothing of other outputs: the image in the pool's registry takes no such statement (see
    `solveplan.exporters`), and neither do archives and files.
    """
    found = {
        f"attest:{kind}": value for kind, value in spec.attestations.items() if value != DISABLED
    }
    pushes = any(output.type == Output.TYPE_REGISTRY for output in spec.outputs)
    if pushes and "provenance" not in spec.attestations:
        found["attest:provenance"] = DEFAULT_PROVENANCE
    return found


def call_attributes(spec: BuildSpec, attributes: dict[str, str]) -> dict[str, str]:
    """Return the frontend attributes of a build, turned into the question of `spec.call`."""
    capabilities = [attributes["frontend.caps"]] if "frontend.caps" in attributes else []
    return {
        **attributes,
        "frontend.caps": ",".join([*capabilities, SUBREQUESTS]),
        "requestid": spec.call,
    }

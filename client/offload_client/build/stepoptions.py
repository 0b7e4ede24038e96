"""How the RUN steps of a build run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NETWORK_MODES = ("", "default", "none", "host")


@dataclass(frozen=True)
class Resources:
    """Bounds of each step; 0 and "" leave the node's own bound. Sizes in bytes."""

    memory_bytes: int = 0
    memory_swap_bytes: int = 0
    """Memory and swap together; -1 for as much swap as there is."""
    cpu_shares: int = 0
    cpu_quota: int = 0
    """Microseconds of processor time per `cpu_period`."""
    cpu_period: int = 0
    """Microseconds."""
    cpuset_cpus: str = ""
    cpuset_mems: str = ""


@dataclass(frozen=True)
class StepOptions:
    """How RUN steps run."""

    network: str = ""
    """One of `NETWORK_MODES`; "default" is said as ""."""
    hosts: Sequence[str] = ()
    """"NAME=ADDRESS"."""
    ulimits: Sequence[str] = ()
    """"NAME=SOFT:HARD"."""
    shm_size_bytes: int = 0
    cgroup_parent: str = ""
    resources: Resources = Resources()

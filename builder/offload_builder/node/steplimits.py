"""Memory and processor time of a build's steps: what the user asked for, within the node's bounds.

BuildKit hands the values to runc, which makes a control group per step. Source: BuildKit's
frontend/dockerui (parseLinuxResources) and solver/llbsolver/linuxresources: where two builds share
a step that runs, the looser of their bounds holds, so the node's bounds are part of every build.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_builder.buildkit.stepbounds import PERIOD_MICROSECONDS, bounds_shell
from offload_core.errors import ConfigError, InvalidValueError
from offload_core.units import format_memory

if TYPE_CHECKING:
    from offload_builder.node.config import NodeConfig
    from offload_proto.v1.build_spec_pb2 import ResourceLimits

MIN_MEMORY_BYTES = 6 << 20
"""As docker: with less no container starts."""
MIN_CPUS = 0.01
"""The kernel wants a quota of a millisecond."""
_CPU_SET = re.compile(r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*")


@dataclass(frozen=True)
class StepBounds:
    """Of a node, for each step; 0 is no bound.

    Attributes:
        memory_bytes: of a build that asks for nothing.
        max_memory_bytes: the most that a build gets.
        cpus: processors of a build that asks for nothing.
        max_cpus: the most that a build gets.
    """

    memory_bytes: int = 0
    max_memory_bytes: int = 0
    cpus: float = 0.0
    max_cpus: float = 0.0

    @classmethod
    def of(cls, config: NodeConfig) -> StepBounds:
        """Return those of a node's configuration."""
        return cls(
            config.step_memory, config.step_memory_max, config.step_cpus, config.step_cpus_max
        )

    def shell(self) -> str:
        """Return what runc's stand-in does before each step, so that they hold for all builds."""
        return bounds_shell(
            memory_bytes=self.memory_bytes,
            max_memory_bytes=self.max_memory_bytes,
            cpus=self.cpus,
            max_cpus=self.max_cpus,
        )

    def check(self) -> None:
        """Refuse bounds that do not go together.

        Raises:
            ConfigError: with the option.
        """
        for name, value in (
            ("step_memory", self.memory_bytes),
            ("step_memory_max", self.max_memory_bytes),
        ):
            if 0 < value < MIN_MEMORY_BYTES:
                raise ConfigError(f"{name} must be {format_memory(MIN_MEMORY_BYTES)} or more")
        for name, cpus in (("step_cpus", self.cpus), ("step_cpus_max", self.max_cpus)):
            if cpus != 0 and not MIN_CPUS <= cpus < math.inf:
                raise ConfigError(f"{name} must be {MIN_CPUS} or more, or 0")
        if 0 < self.max_memory_bytes < self.memory_bytes:
            raise ConfigError("step_memory must not be more than step_memory_max")
        if 0 < self.max_cpus < self.cpus:
            raise ConfigError("step_cpus must not be more than step_cpus_max")


def resource_attributes(limits: ResourceLimits, bounds: StepBounds) -> dict[str, str]:
    """Return the attributes for the Dockerfile frontend.

    Raises:
        InvalidValueError: a value cannot be, or exceeds what the node gives.
    """
    _check(limits)
    found = _memory(limits, bounds) | _processors(limits, bounds)
    if limits.cpu_shares:
        found["cpushares"] = str(limits.cpu_shares)
    if limits.cpuset_cpus:
        found["cpusetcpus"] = limits.cpuset_cpus
    if limits.cpuset_mems:
        found["cpusetmems"] = limits.cpuset_mems
    return found


def _check(limits: ResourceLimits) -> None:
    numbers = {
        "memory": limits.memory_bytes,
        "cpu-shares": limits.cpu_shares,
        "cpu-quota": limits.cpu_quota,
        "cpu-period": limits.cpu_period,
    }
    for name, value in numbers.items():
        if value < 0:
            raise InvalidValueError(f"--resource {name} must be greater than 0")
    if limits.memory_swap_bytes < -1:
        raise InvalidValueError("--resource memory-swap must be greater than 0, or -1 for no limit")
    if 0 < limits.memory_bytes < MIN_MEMORY_BYTES:
        raise InvalidValueError(
            f"--resource memory must be {format_memory(MIN_MEMORY_BYTES)} or more"
        )
    if 0 < limits.memory_swap_bytes < limits.memory_bytes:
        raise InvalidValueError(
            "--resource memory-swap is memory and swap together: not less than memory"
        )
    for name, text in (("cpuset-cpus", limits.cpuset_cpus), ("cpuset-mems", limits.cpuset_mems)):
        if text and _CPU_SET.fullmatch(text) is None:
            raise InvalidValueError(f'--resource {name} is for example 0-3,8, not "{text[:100]}"')


def _memory(limits: ResourceLimits, bounds: StepBounds) -> dict[str, str]:
    most = bounds.max_memory_bytes
    memory = limits.memory_bytes or bounds.memory_bytes or most
    if most and memory > most:
        raise InvalidValueError(
            f"--resource memory={format_memory(limits.memory_bytes)} is more than this node gives "
            f"a step; ask for {format_memory(most)} or less"
        )
    found = {"memory": str(memory)} if memory else {}
    swap = limits.memory_swap_bytes
    if swap:
        if not memory:
            raise InvalidValueError("--resource memory-swap needs memory as well")
        if most and (swap == -1 or swap > 2 * most):
            raise InvalidValueError(
                "--resource memory-swap is more than this node gives a step; "
                f"ask for {format_memory(2 * most)} or less"
            )
        found["memswap"] = str(swap)
    return found


def _processors(limits: ResourceLimits, bounds: StepBounds) -> dict[str, str]:
    period = limits.cpu_period or PERIOD_MICROSECONDS
    quota = limits.cpu_quota
    if not quota:
        cpus = bounds.cpus or bounds.max_cpus
        quota = round(cpus * period)
    elif bounds.max_cpus and quota / period > bounds.max_cpus:
        raise InvalidValueError(
            f"--resource cpu-quota={quota} is {quota / period:g} processors, more than this node "
            f"gives a step; ask for {bounds.max_cpus:g} or fewer"
        )
    found = {"cpuquota": str(quota)} if quota else {}
    if quota or limits.cpu_period:
        found["cpuperiod"] = str(period)
    return found

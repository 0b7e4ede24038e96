"""What all steps of one build together may use: memory, processors, processes and disk.

`build_*` of a node's configuration, and `project_build_limits` for single projects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_builder.node.steplimits import MIN_CPUS, MIN_MEMORY_BYTES
from offload_cache.mirror.patterns import matches
from offload_core.errors import ConfigError, OffloadError
from offload_core.units import format_memory, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_builder.node.config import NodeConfig

MIN_PROCESSES = 16
"""A shell, what it starts, and runc's own threads."""
MIN_DISK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """Of one build; 0 is no bound.

    Attributes:
        memory_bytes: of all of its steps that run.
        cpus: processors.
        processes: with their threads.
        disk_bytes: what its steps write.
    """

    memory_bytes: int = 0
    cpus: float = 0.0
    processes: int = 0
    disk_bytes: int = 0

    @property
    def any(self) -> bool:
        """Whether there is a bound."""
        return bool(self.memory_bytes or self.cpus or self.processes or self.disk_bytes)

    @classmethod
    def of(cls, config: NodeConfig, project_id: str) -> BuildLimits:
        """Return what a node's configuration says for a project.

        What the lists of a project do not name is as for all; of several lists the later counts.
        """
        limits = cls(config.build_memory, config.build_cpus, config.build_pids, config.build_disk)
        for pattern, values in config.project_build_limits.items():
            if matches((pattern,), project_id):
                limits = limits.with_values(values)
        return limits

    def with_values(self, values: Iterable[str]) -> BuildLimits:
        """Return these with some replaced.

        Args:
            values: NAME=VALUE with memory, cpus, pids or disk; 0 takes a bound away.

        Raises:
            ConfigError: one is wrong.
        """
        limits = self
        for text in values:
            name, _, value = text.partition("=")
            try:
                if name == "memory":
                    limits = replace(limits, memory_bytes=parse_size(value))
                elif name == "cpus":
                    limits = replace(limits, cpus=float(value))
                elif name == "pids":
                    limits = replace(limits, processes=int(value))
                elif name == "disk":
                    limits = replace(limits, disk_bytes=parse_size(value))
                else:
                    raise ValueError(name)
            except (ValueError, OffloadError) as error:
                raise ConfigError(
                    f'"{text[:100]}" is no bound of a build; use memory=SIZE, cpus=NUMBER, '
                    "pids=NUMBER or disk=SIZE"
                ) from error
        return limits

    def check(self) -> None:
        """Refuse bounds with which nothing can be built.

        Raises:
            ConfigError: with the bound.
        """
        for name, value, least, shown in (
            ("memory", self.memory_bytes, MIN_MEMORY_BYTES, format_memory(MIN_MEMORY_BYTES)),
            ("cpus", self.cpus, MIN_CPUS, str(MIN_CPUS)),
            ("pids", self.processes, MIN_PROCESSES, str(MIN_PROCESSES)),
            ("disk", self.disk_bytes, MIN_DISK_BYTES, format_memory(MIN_DISK_BYTES)),
        ):
            if value != 0 and not least <= value < math.inf:
                raise ConfigError(f"the bound {name} of builds must be {shown} or more, or 0")


def check_build_limits(config: NodeConfig) -> None:
    """Refuse bounds of a configuration that cannot be.

    Raises:
        ConfigError: with the option.
    """
    general = BuildLimits(
        config.build_memory, config.build_cpus, config.build_pids, config.build_disk
    )
    general.check()
    for pattern, values in config.project_build_limits.items():
        try:
            general.with_values(values).check()
        except ConfigError as error:
            raise ConfigError(f"project_build_limits: {pattern}: {error.message}") from error

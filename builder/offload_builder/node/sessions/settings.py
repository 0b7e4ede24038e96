"""What a node's configuration says about sessions, documented in docs/configuration.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - part of a dataclass

from offload_core.config import option
from offload_core.errors import ConfigError
from offload_core.units import format_duration, format_memory

MIN_MEMORY_BYTES = 256 << 20
"""An engine has 110 MiB before its first container."""
MIN_DISK_BYTES = 512 << 20
MIN_CPUS = 0.1
MIN_PIDS = 128
"""An engine has some forty threads."""
_MEANING_OF_ZERO = {
    "session_slots": "takes no sessions",
    "sessions_ready": "keeps none",
    "session_cpus": "gives 2, or all of a smaller machine",
    "session_cpus_max": "is all of the machine",
    "session_memory": "gives 2 GiB, or a share of what sessions may have",
    "session_memory_max": "is what all sessions may have",
    "session_memory_all": "is three quarters of the machine's",
    "session_disk": "gives 20 GiB, or a share of what is free",
    "session_disk_max": "is what is free",
    "session_models_max": "keeps none",
    "session_grace": "removes sessions as soon as they are idle",
}


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """The options of a node that are about sessions; `NodeConfig` has them."""

    session_slots: int = option(
        2,
        "sessions of docker engines that may be open at once; 0 takes none. A node takes sessions "
        "only where isolation is netns",
    )
    sessions_ready: int = option(
        1, "engines that are kept ready for the next sessions; 0 makes each when it is wanted"
    )
    sessions_dockerd: Path | None = option(
        None, "path of the dockerd of sessions, 28 or newer; searched when not set"
    )
    session_cpus: float = option(
        0.0, "processors of a session that asks for none; 0 for 2, or all of a smaller machine"
    )
    session_cpus_max: float = option(
        0.0, "most processors that a session can have; 0 for all of the machine"
    )
    session_memory: int = option(
        0,
        "memory of a session that asks for none; 0 for 2GiB, or its share of session_memory_all "
        "where that is less",
        unit="size",
    )
    session_memory_max: int = option(
        0, "most memory that a session can have; 0 for session_memory_all", unit="size"
    )
    session_memory_all: int = option(
        0,
        "memory of all sessions together, those that are paused included; 0 for three quarters of "
        "the machine's",
        unit="size",
    )
    session_disk: int = option(
        0,
        "disk of a session that asks for none; 0 for 20GiB, or its share of what is free when the "
        "node starts, where that is less",
        unit="size",
    )
    session_disk_max: int = option(
        0, "most disk that a session can have; 0 for what is free", unit="size"
    )
    session_models_max: int = option(
        100 * 1024**3,
        "bytes of model files of a project up to which they are kept in the shared store for its "
        "next sessions; 0 keeps none",
        unit="size",
    )
    session_pids: int = option(4096, "processes and threads of everything in a session")
    session_idle: float = option(
        300.0, "pause a session that asks for nothing else after so long unused", unit="duration"
    )
    session_idle_max: float = option(
        3600.0, "longest time without use that a session can ask for", unit="duration"
    )
    session_grace: float = option(
        600.0,
        "keep what is in a paused session for so long; it is removed when nobody comes back",
        unit="duration",
    )
    session_ttl: float = option(
        8 * 3600.0, "end a session that asks for nothing else after so long", unit="duration"
    )
    session_ttl_max: float = option(
        24 * 3600.0, "longest life that a session can ask for", unit="duration"
    )

    def check_sessions(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: with the option and what is allowed.
        """
        for name, zero in _MEANING_OF_ZERO.items():
            value = getattr(self, name)
            if value < 0 or not math.isfinite(value):
                raise ConfigError(f"{name} must not be negative; 0 {zero}")
        least: dict[str, float] = {
            "session_memory": MIN_MEMORY_BYTES,
            "session_disk": MIN_DISK_BYTES,
            "session_cpus": MIN_CPUS,
        }
        for name, bound in least.items():
            value, most = getattr(self, name), getattr(self, f"{name}_max")
            shown = format_memory(bound) if bound > 1 else f"{bound:g}"
            if 0 < value < bound or 0 < most < bound:
                raise ConfigError(f"{name} and {name}_max must be {shown} or more, or 0")
            if 0 < most < value:
                raise ConfigError(f"{name} must not be more than {name}_max")
        if self.session_pids < MIN_PIDS:
            raise ConfigError(f"session_pids must be {MIN_PIDS} or more")
        for name in ("session_idle", "session_ttl"):
            most = getattr(self, f"{name}_max")
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(
                    f"{name} must be more than 0 and at most {name}_max, {format_duration(most)}"
                )

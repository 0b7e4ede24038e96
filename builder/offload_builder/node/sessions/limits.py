"""What a session gets of its node: what it asks for, within the node's bounds."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from offload_builder.node.sessions.contract import EngineLimits
from offload_builder.node.sessions.settings import MIN_CPUS, MIN_DISK_BYTES, MIN_MEMORY_BYTES
from offload_core.errors import InvalidValueError
from offload_core.units import format_duration, format_memory
from offload_proto.v1.sessions_service_pb2 import SessionLimits, SessionSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.sessions.settings import SessionOptions

DEFAULT_CPUS = 2.0
DEFAULT_MEMORY_BYTES = 2 << 30
DEFAULT_DISK_BYTES = 20 << 30
MIN_IDLE_SECONDS = 5.0
MIN_TTL_SECONDS = 10.0
_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""Control groups without a limit say a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine has.

    Attributes:
        cpus: processors that this process may use.
        memory_bytes: of memory, or what this process' control group may have of it.
    """

    cpus: float
    memory_bytes: int

    @classmethod
    def here(cls) -> Machine:
        """Return what this machine has."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(float(len(os.sched_getaffinity(0))), min([memory, *_group_memory()]))


def _group_memory() -> list[int]:
    found = []
    # A container has its own group at the root; both versions of control groups.
    for file in ("memory/memory.limit_in_bytes", "memory.max"):
        try:
            text = (_GROUPS / file).read_text("ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _NO_LIMIT:
            found.append(int(text))
    return found


@dataclass(frozen=True, slots=True)
class GivenLimits:
    """What one session has got; times in seconds.

    Attributes:
        engine: of the engine with everything in it.
        idle_seconds: paused after so long without use.
        grace_seconds: removed after so long in pause.
        ttl_seconds: ended after so long.
    """

    engine: EngineLimits
    idle_seconds: float
    grace_seconds: float
    ttl_seconds: float

    def message(self) -> SessionLimits:
        """Return them as gateway and clients hear them."""
        return SessionLimits(
            cpu_millis=self.engine.cpu_millis,
            memory_bytes=self.engine.memory_bytes,
            disk_bytes=self.engine.disk_bytes,
            idle_timeout=duration(self.idle_seconds),
            grace=duration(self.grace_seconds),
            ttl=duration(self.ttl_seconds),
        )


class SessionBounds:
    """What sessions can have at a node.

    Args:
        options: of the node.
        machine: what there is.
        free_disk: bytes that sessions can have together, at the node's start.
    """

    def __init__(self, options: SessionOptions, machine: Machine, free_disk: int) -> None:
        self._options = options
        self.max_cpus = min(options.session_cpus_max or machine.cpus, machine.cpus)
        self.memory_all = options.session_memory_all or machine.memory_bytes * 3 // 4
        self.max_memory = min(options.session_memory_max or self.memory_all, self.memory_all)
        shares = max(1, options.session_slots)
        # Fixed from the start, so that engines that are made ready fit most sessions.
        self.default = EngineLimits(
            round(min(options.session_cpus or DEFAULT_CPUS, self.max_cpus) * 1000),
            min(
                options.session_memory or min(DEFAULT_MEMORY_BYTES, self.memory_all // shares),
                self.max_memory,
            ),
            options.session_disk
            or min(
                DEFAULT_DISK_BYTES,
                options.session_disk_max or DEFAULT_DISK_BYTES,
                max(MIN_DISK_BYTES, free_disk // shares),
            ),
            options.session_pids,
        )
        """What a session gets that asks for nothing."""

    def most(self, free_disk: int) -> GivenLimits:
        """Return the most that one session can have, given how much disk is free."""
        options = self._options
        disk = min(options.session_disk_max or free_disk, free_disk)
        return GivenLimits(
            EngineLimits(round(self.max_cpus * 1000), self.max_memory, disk, options.session_pids),
            options.session_idle_max,
            options.session_grace,
            options.session_ttl_max,
        )

    def give(self, spec: SessionSpec) -> GivenLimits:
        """Return what a session gets, if there is enough left.

        Raises:
            InvalidValueError: it asks for more, or less, than any session has here.
        """
        options, default = self._options, self.default
        cpus = spec.cpu_millis or default.cpu_millis
        if spec.cpu_millis:
            _within("processors", cpus / 1000, MIN_CPUS, self.max_cpus, "{:g}".format)
        memory = spec.memory_bytes or default.memory_bytes
        if spec.memory_bytes:
            _within("memory", memory, MIN_MEMORY_BYTES, self.max_memory, format_memory)
        disk = spec.disk_bytes or default.disk_bytes
        if spec.disk_bytes:
            largest = options.session_disk_max or _NO_LIMIT
            _within("disk", disk, MIN_DISK_BYTES, largest, format_memory)
        idle, ttl = options.session_idle, options.session_ttl
        if spec.HasField("idle_timeout"):
            idle, most = _seconds(spec.idle_timeout), options.session_idle_max
            _within("idle timeout", idle, MIN_IDLE_SECONDS, most, format_duration)
        if spec.HasField("ttl"):
            ttl, most = _seconds(spec.ttl), options.session_ttl_max
            _within("time to live", ttl, MIN_TTL_SECONDS, most, format_duration)
        engine = EngineLimits(cpus, memory, disk, default.pids)
        return GivenLimits(engine, idle, options.session_grace, ttl)


def duration(seconds: float) -> Duration:
    """Return a time as messages have it, exact to a millisecond."""
    made = Duration()
    made.FromMilliseconds(max(0, round(seconds * 1000)))
    return made


def _seconds(given: Duration) -> float:
    return given.seconds + given.nanos / 1e9


def _within(
    what: str, value: float, least: float, most: float, write: Callable[[float], str]
) -> float:
    if value > most:
        raise InvalidValueError(
            f"the {what} of a session can be at most {write(most)} at this node, "
            f"not {write(value)}",
            hint="ask for less, or for another node with --node-label",
        )
    if value < least:
        raise InvalidValueError(
            f"the {what} of a session must be {write(least)} or more, not {write(value)}"
        )
    return value


def free_disk(data: Path, reserve: int) -> int:
    """Return the free bytes below a directory, less what is to be left."""
    found = shutil.disk_usage(data)
    return max(0, found.free - min(reserve, found.total // 10))

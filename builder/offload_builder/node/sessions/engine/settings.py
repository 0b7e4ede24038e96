"""What a node says about its engines, and where their programs are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping  # noqa: TC003 - part of a dataclass
from dataclasses import dataclass, field
from pathlib import Path

from offload_builder.node.sessions.contract import EngineLimits
from offload_core.errors import ConfigError

BINARY_VARIABLE = "OFFLOAD_DOCKERD"
OLDEST = 28
"""First docker engine whose containers get devices by CDI without a setting."""
PROGRAMS = ("containerd", "containerd-shim-runc-v2", "runc")
_SECONDS = 20.0
_VERSION = re.compile(r"^Docker version (?:v?(\d+)\.)?")
_UNKNOWN = 1000
"""Major version of a program that was built without being told its own."""
FIRST_ID = 0x7000_0000
"""systemd gives users up to the one before to containers (docs/UIDS-GIDS.md)."""

READY_LIMITS = EngineLimits(cpu_millis=2000, memory_bytes=2 << 30, disk_bytes=20 << 30, pids=4096)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The engines of one node.

    Attributes:
        data: directory of all engines; nothing else may be in it.
        dockerd: the program; found by `find_programs` when None.
        search: further directories to look for programs in.
        ready: engines that are kept ready.
        ready_limits: of an engine before it is taken; its disk is that of engines that are ready.
        ready_min_available_bytes: memory that has to be available to make one ready.
        min_free_bytes: of the machine's disk, without which no engine is made.
        cdi_spec_dirs: directories with specifications of devices.
        start_seconds: an engine that does not answer in this time is given up.
        first_id: users and groups from this one on belong to engines.
        address_pools: networks that containers get addresses of: network and prefix length.
        options: further settings of dockerd, as in its daemon.json.
    """

    data: Path
    dockerd: Path | None = None
    search: tuple[Path, ...] = ()
    ready: int = 1
    ready_limits: EngineLimits = READY_LIMITS
    ready_min_available_bytes: int = 1 << 30
    min_free_bytes: int = 1 << 30
    cdi_spec_dirs: tuple[Path, ...] = ()
    start_seconds: float = 30.0
    first_id: int = FIRST_ID
    address_pools: tuple[tuple[str, int], ...] = (("172.17.0.0/16", 24),)
    options: Mapping[str, object] = field(default_factory=dict)


def find_programs(settings: EngineSettings) -> tuple[Path, ...]:
    """Return the programs of an engine, dockerd first; blocks.

    dockerd is the configured one, $OFFLOAD_DOCKERD, or the first one in PATH and `search` that is
    new enough.

    Raises:
        ConfigError: one is not there.
    """
    # Not in every PATH of a service.
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin", "/sbin"]
    search = os.pathsep.join([*folders, *map(str, settings.search)])
    found = [_find_dockerd(settings, search.split(os.pathsep))]
    for name in PROGRAMS:
        path = shutil.which(name, path=search)
        if path is None:
            raise ConfigError(
                f"{name} was not found", hint="install containerd and runc for docker sessions"
            )
        found.append(Path(path))
    return tuple(found)


def _find_dockerd(settings: EngineSettings, folders: list[str]) -> Path:
    named = os.environ.get(BINARY_VARIABLE)
    for path, origin in (
        (settings.dockerd, "the configuration"),
        (Path(named) if named else None, BINARY_VARIABLE),
    ):
        if path is not None:
            if (major := _major(path)) >= OLDEST:
                return path
            what = f"version {major}, and {OLDEST} is needed" if major else "no program that works"
            raise ConfigError(f"{origin} names {path} as dockerd, but that is {what}")
    old = 0
    for folder in folders:
        path = Path(folder, "dockerd")
        if (major := _major(path)) >= OLDEST:
            return path
        old = max(old, major)
    raise ConfigError(
        f"dockerd is version {old}; sessions need {OLDEST}" if old else "dockerd was not found",
        hint=f"install docker engine {OLDEST} or newer so that dockerd is in PATH, or name the "
        f"program in the node's configuration (sessions_dockerd) or in {BINARY_VARIABLE}",
    )


def _major(path: Path) -> int:
    """Return the first number of a dockerd's version; 0 when it is none."""
    if not os.access(path, os.X_OK) or not path.is_file():
        return 0
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = _VERSION.search(done.stdout)
    return int(match[1] or _UNKNOWN) if match else 0

"""Makes engines, keeps some ready, and removes them with everything of theirs."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.buildkit.daemon_rundir import make_private, run_directory
from offload_builder.node.sessions.engine.dockerengine import DockerEngine
from offload_builder.node.sessions.engine.groups import sweep_groups
from offload_builder.node.sessions.engine.settings import find_programs
from offload_builder.node.sessions.engine.sweeping import sweep_engines
from offload_core.aio import TaskSet, finish
from offload_core.errors import ConfigError, NodeLostError, OffloadError, QuotaExceededError
from offload_core.units import format_size

if TYPE_CHECKING:
    from offload_builder.node.sessions.contract import (
        Engine,
        EngineLimits,
        EngineSpec,
        SessionNetworks,
    )
    from offload_builder.node.sessions.engine.settings import EngineSettings

_log = structlog.get_logger(__name__)
_AGAIN_SECONDS = 30.0
"""After an engine could not be made ready."""
_LOOK_SECONDS = 5.0
_REMOVE_SECONDS = 60.0


class EngineHost:
    """The engines of a node; an async context manager, which removes all of them at its end.

    Entering removes what an earlier node has left. Enter it in the main thread: engines end with
    the thread that started them.

    Args:
        settings: of the node.
        networks: where engines get theirs.
    """

    def __init__(self, settings: EngineSettings, networks: SessionNetworks) -> None:
        self._settings = settings
        self._networks = networks
        self._engines: dict[str, DockerEngine] = {}
        self._ready: list[DockerEngine] = []
        self._programs: tuple[Path, ...] = ()
        self._why_impossible = "this node has not looked yet whether it can have docker engines"
        self._sockets = run_directory(settings.data)
        self._tasks = TaskSet(on_error=_log_failure)
        self._taken = asyncio.Event()
        self._closing = False

    def why_impossible(self) -> str:
        """Return why this machine can have no engines, in a sentence; empty when it can."""
        return self._why_impossible

    @property
    def ready(self) -> int:
        """How many engines are ready now."""
        return len(self._ready)

    async def __aenter__(self) -> Self:
        """Remove leftovers, find out what the machine can, and begin to make engines ready."""
        if os.geteuid() == 0:
            await self.sweep()
        self._why_impossible = await asyncio.to_thread(self._look)
        if not self._why_impossible and self._settings.ready > 0:
            self._tasks.start(self._keep_ready(), name="session-engines-ready")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        await self._tasks.close(_REMOVE_SECONDS)
        await finish(self._remove_all(), _REMOVE_SECONDS)

    async def _remove_all(self) -> None:
        await asyncio.gather(
            *(self.remove(engine_id) for engine_id in list(self._engines)), return_exceptions=True
        )
        if os.geteuid() == 0:
            await asyncio.to_thread(sweep_groups, self._settings.data)
            await asyncio.to_thread(shutil.rmtree, self._sockets, ignore_errors=True)

    async def sweep(self) -> None:
        """Remove everything of engines that this object does not have."""
        kept = frozenset(self._engines)
        await asyncio.to_thread(sweep_engines, self._settings.data, kept)
        for path in self._sockets.glob("*.sock"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    def _look(self) -> str:
        """Find the programs; return why there can be no engines. Blocks."""
        if os.geteuid() != 0:
            return "docker engines of sessions need root on this node"
        try:
            self._programs = find_programs(self._settings)
            self._settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private(self._sockets)
        except ConfigError as error:
            return f"this node has no docker engine for sessions: {error.message}"
        except OSError as error:
            return f"this node has no place for docker engines: {error}"
        if not Path("/dev/loop-control").exists():
            return "this machine has no loop devices, which are the disks of docker engines"
        if shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            return "this machine has no mkfs.ext4, which makes the disks of docker engines"
        for name in ("user", "pid", "cgroup"):
            if not Path("/proc/self/ns", name).exists():
                return f"the kernel of this machine has no {name} namespaces"
        with suppress(OSError, ValueError):
            if int(Path("/proc/sys/user/max_user_namespaces").read_text()) < 1:
                return "this machine permits no user namespaces (user.max_user_namespaces is 0)"
        return ""

    async def create(self, spec: EngineSpec) -> Engine:
        """Return an engine that answers; it has a network from which nothing can be reached yet.

        Raises:
            QuotaExceededError: the node has no room for it.
            DeviceUnavailableError: the node has no such device.
            NodeLostError: it does not start; the sentence says why.
        """
        if self._why_impossible:
            raise NodeLostError(self._why_impossible)
        engine = self._take_ready(spec)
        if engine is not None:
            try:
                await engine.limit(spec.limits)
            except BaseException:
                await finish(self.remove(engine.engine_id), _REMOVE_SECONDS)
                raise
            _log.info("session.engine.taken", engine_id=engine.engine_id)
            return engine
        return await self._make(spec.limits, spec.devices)

    def _take_ready(self, spec: EngineSpec) -> DockerEngine | None:
        if spec.devices:
            return None
        for engine in self._ready:
            if engine.limits.disk_bytes == spec.limits.disk_bytes and engine.pid:
                self._ready.remove(engine)
                self._taken.set()
                return engine
        return None

    async def _make(self, limits: EngineLimits, devices: tuple[str, ...] = ()) -> DockerEngine:
        free = shutil.disk_usage(self._settings.data).free
        if free < self._settings.min_free_bytes:
            raise QuotaExceededError(
                f"the node's disk has {format_size(free)} left, too little for a docker engine"
            )
        engine_id = secrets.token_hex(6)
        address = self._sockets / f"{engine_id}.sock"
        engine = DockerEngine(
            engine_id, self._settings, self._programs, address, limits=limits, devices=devices
        )
        self._engines[engine_id] = engine
        began = asyncio.get_running_loop().time()
        try:
            await engine.open(self._networks)
        except BaseException:
            await finish(self.remove(engine_id), _REMOVE_SECONDS)
            raise
        seconds = asyncio.get_running_loop().time() - began
        _log.info("session.engine.started", engine_id=engine_id, seconds=round(seconds, 3))
        return engine

    async def pause(self, engine: Engine) -> None:
        """Stop its processes, containers included; images, containers and volumes stay.

        Raises:
            NodeLostError: it is gone, or its disk is not let go of.
        """
        await self._own(engine).pause()

    async def wake(self, engine: Engine) -> None:
        """Start a paused engine.

        Raises:
            NodeLostError: it does not start, or is gone.
        """
        await self._own(engine).wake()

    def _own(self, engine: Engine) -> DockerEngine:
        found = self._engines.get(engine.engine_id)
        if found is None:
            raise NodeLostError("the docker engine is gone")
        return found

    async def remove(self, engine_id: str) -> None:
        """Remove everything of an engine; nothing happens when there is nothing."""
        engine = self._engines.get(engine_id)
        if engine is None:
            return
        if engine in self._ready:
            self._ready.remove(engine)
        await engine.close()
        self._engines.pop(engine_id, None)

    async def _keep_ready(self) -> None:
        while True:
            self._taken.clear()
            wait = _LOOK_SECONDS
            try:
                for engine in [one for one in self._ready if one.ended.done()]:
                    await self.remove(engine.engine_id)
                if len(self._ready) < self._settings.ready and self._has_memory():
                    self._ready.append(await self._make(self._settings.ready_limits))
                    continue
            except (OffloadError, OSError) as error:
                _log.warning("session.engine.not_ready", error=str(error))
                wait = _AGAIN_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._taken.wait()

    def _has_memory(self) -> bool:
        return _available_bytes() >= self._settings.ready_min_available_bytes


def _available_bytes() -> int:
    """Return the memory that could be had without swapping; proc(5), meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _log_failure(name: str, error: BaseException) -> None:
    _log.error("session.engine.task_failed", task=name, error=str(error))

"""One engine: its files, groups, users and network, and the process that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.buildkit.daemon_log import DaemonLog
from offload_builder.node.sessions.engine import content, loops
from offload_builder.node.sessions.engine.devices import EngineDevices, find_devices
from offload_builder.node.sessions.engine.groups import EngineGroups
from offload_builder.node.sessions.engine.idranges import COUNT, IdRange, take_range
from offload_builder.node.sessions.engine.process import EngineProcess
from offload_builder.node.sessions.engine.record import DISK, LOG, ROOT, EngineRecord
from offload_core.aio import finish
from offload_core.errors import NodeLostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from offload_builder.node.sessions.contract import (
        EngineLimits,
        SessionNetwork,
        SessionNetworks,
    )
    from offload_builder.node.sessions.engine.plan import NetworkPlan, Plan
    from offload_builder.node.sessions.engine.settings import EngineSettings

_log = structlog.get_logger(__name__)
_BLOCK_BYTES = 512
_LOG_BYTES_PER_SECOND = 1 << 18
"""Who is root in an engine can write to its log as well."""
_FORMAT_SECONDS = 60.0
_STOP_SECONDS = content.STOP_SECONDS + 4.0
_DETACH_SECONDS = 20.0
_END_SECONDS = 15.0


class DockerEngine:
    """A docker engine with namespaces of its own; `open` it, later `close` it.

    Attributes: see the contract's Engine.
    """

    def __init__(
        self,
        engine_id: str,
        settings: EngineSettings,
        programs: Sequence[Path],
        address: Path,
        *,
        limits: EngineLimits,
        devices: tuple[str, ...] = (),
    ) -> None:
        self.engine_id = engine_id
        self.socket = address
        self.devices = devices
        self.id_base = 0
        self.version = ""
        self.limits = limits
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._programs = programs
        self._folder = settings.data / engine_id
        self._groups = EngineGroups(settings.data, engine_id)
        self._found = EngineDevices()
        self._ids: IdRange | None = None
        self._users = -1
        self._network: SessionNetwork | None = None
        self._stack = AsyncExitStack()
        self._process: EngineProcess | None = None
        self._turn = asyncio.Lock()

    @property
    def pid(self) -> int:
        """Of the first process of its namespaces; 0 while it does not run."""
        process = self._process
        return process.pid if process is not None and not process.ended.done() else 0

    @property
    def root(self) -> Path:
        """Its root file system. Links in it are those of whoever uses the engine."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def log(self) -> Path:
        """File with what dockerd prints."""
        return self._folder / LOG

    def open_network(self) -> int:
        """Return a descriptor of its network namespace, which the caller closes.

        Raises:
            NodeLostError: it has none any more.
        """
        network = self._network
        try:
            # Of the node's own, for a number of a process may be another one's already.
            if network is not None:
                return os.open(network.namespace, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NodeLostError("the network of the docker engine is gone") from error
        raise NodeLostError("the docker engine has no network any more")

    def disk_used(self) -> int:
        """Return how many bytes of this machine's disk it has."""
        try:
            return (self._folder / DISK).stat().st_blocks * _BLOCK_BYTES
        except OSError:
            return 0

    async def open(self, networks: SessionNetworks) -> None:
        """Make everything of it and start it. After an error, `close` it.

        Raises:
            NodeLostError: it does not start.
            QuotaExceededError: the machine has no room for it.
            DeviceUnavailableError: the machine has no such device.
        """
        async with self._turn:
            try:
                await self._deadline(self._open(networks))
            except OSError as error:
                raise NodeLostError(f"the docker engine did not start: {error}") from error

    async def _open(self, networks: SessionNetworks) -> None:
        self._found = await asyncio.to_thread(
            find_devices, self._settings.cdi_spec_dirs, self.devices
        )
        await asyncio.to_thread(self._prepare)
        formatting = asyncio.ensure_future(self._format())

        async def network(users: str) -> NetworkPlan:
            self._users = os.open(users, os.O_RDONLY | os.O_CLOEXEC)
            attach = networks.attach(self.engine_id, self._users_path())
            self._network = await self._stack.enter_async_context(attach)
            await formatting
            return self._network_plan(self._network)

        try:
            await self._start("", network)
        finally:
            formatting.cancel()
            await asyncio.wait((formatting,))

    async def _start(self, users: str, network: Callable[[str], Awaitable[NetworkPlan]]) -> None:
        log = DaemonLog(self._folder / LOG, bytes_per_second=_LOG_BYTES_PER_SECOND)
        process = EngineProcess(log, self._groups)
        self._process = process
        await process.start(self._plan(users), self.socket, network, self._keep)
        self.version = process.version
        process.ended.add_done_callback(lambda _: self._note_end(process))

    async def _deadline(self, starting: Coroutine[Any, Any, None]) -> None:
        seconds = self._settings.start_seconds
        try:
            async with asyncio.timeout(seconds):
                await starting
        except TimeoutError as error:
            if self._process is not None:
                raise self._process.describe_late(seconds) from error
            raise NodeLostError(f"no docker engine could be made within {seconds:g} s") from error

    def _prepare(self) -> None:
        self._folder.mkdir(mode=0o700)
        EngineRecord().write(self._folder)
        self._ids = take_range(self._settings.first_id)
        self.id_base = self._ids.base
        (self._folder / ROOT).mkdir()
        self._groups.make(self.id_base, [node[1:] for node in self._found.nodes])
        self._groups.limit(self.limits)

    async def _format(self) -> None:
        disk = self._folder / DISK
        with disk.open("xb") as file:
            file.truncate(self.limits.disk_bytes)
        # Nothing of it outlives the node, so it needs no journal.
        process = await asyncio.create_subprocess_exec(
            "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode",
            "-E", "lazy_itable_init=1,nodiscard,packed_meta_blocks=1", str(disk),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
        )  # fmt: skip
        try:
            async with asyncio.timeout(_FORMAT_SECONDS):
                _, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            why = said.decode("utf-8", "replace").strip()
            raise NodeLostError(f"the disk of a docker engine cannot be made: {why}")

    def _plan(self, users: str) -> Plan:
        shown, links = content.binds()
        return {
            "id_base": self.id_base,
            "id_count": COUNT,
            "users": users,
            "root": str(self._folder / ROOT),
            "disk": str(self._folder / DISK),
            "binds": shown,
            "links": links,
            "programs": content.outside_programs(self._programs),
            "nodes": list(self._found.nodes),
            "device_files": list(self._found.files),
            "files": [*content.texts(self.engine_id), *self._found.specifications],
            "groups": self._groups.own(),
            "group_links": self._groups.links(),
            "unified": self._groups.unified,
            "listener": -1,
            "hostname": self.engine_id,
            "command": [content.place_of(self._programs[0]), "--config-file", content.CONFIG],
        }

    def _network_plan(self, network: SessionNetwork) -> NetworkPlan:
        files = content.network_texts(self._settings, network, self.devices)
        return {"namespace": str(network.namespace), "files": files}

    def _users_path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self._users}")

    def _keep(self, record: EngineRecord) -> None:
        record.write(self._folder)

    def _note_end(self, process: EngineProcess) -> None:
        if self._process is process and not self.ended.done():
            lines = process.last_lines()
            why = f"dockerd ended with exit code {process.ended.result()}"
            _log.warning("session.engine.died", engine_id=self.engine_id, log_tail=lines)
            self.ended.set_result(f"{why}\n{lines}" if lines else why)

    async def limit(self, limits: EngineLimits) -> None:
        """Put limits into force; the disk keeps its size.

        Raises:
            NodeLostError: the kernel does not.
        """
        try:
            await asyncio.to_thread(self._groups.limit, limits)
        except OSError as error:
            raise NodeLostError(f"the docker engine cannot be bounded: {error}") from error
        self.limits = limits

    async def pause(self) -> None:
        """End its processes and keep its disk.

        Raises:
            NodeLostError: its disk is not let go of.
        """
        async with self._turn:
            process, self._process = self._process, None
            if process is not None:
                try:
                    await process.stop(_STOP_SECONDS)
                finally:
                    await process.kill()
                await asyncio.to_thread(self._keep, EngineRecord())
            await self._released()

    async def _released(self) -> None:
        if not await asyncio.to_thread(loops.wait_until_detached, self._folder, _DETACH_SECONDS):
            raise NodeLostError("the disk of the docker engine is still in use")

    async def wake(self) -> None:
        """Start it on its disk. After an error it is paused again.

        Raises:
            NodeLostError: it does not start.
        """

        async def network(_: str) -> NetworkPlan:
            if self._network is None:
                raise NodeLostError("the docker engine has no network any more")
            return self._network_plan(self._network)

        async with self._turn:
            if self.pid:
                return
            await self._end()
            if self.ended.done():
                self.ended = asyncio.get_running_loop().create_future()
            # Twice in use, the file system would break.
            await self._released()
            try:
                await self._deadline(self._start(str(self._users_path()), network))
            except OSError as error:
                await finish(self._end(), _END_SECONDS)
                raise NodeLostError(f"the docker engine did not start: {error}") from error
            except BaseException:
                await finish(self._end(), _END_SECONDS)
                raise

    async def _end(self) -> None:
        """Kill everything in it.

        Raises:
            NodeLostError: it does not end; it can be tried again.
        """
        process, self._process = self._process, None
        if process is not None:
            try:
                await process.kill()
            except BaseException:
                self._process = process
                raise

    async def close(self) -> None:
        """Remove everything of it."""
        async with self._turn, AsyncExitStack() as rest:
            # Its path is soon that of something else.
            self._network = None
            # Each of them whatever becomes of the others: what is left of an engine is cut off.
            rest.callback(self.ended.cancel)
            rest.push_async_callback(asyncio.to_thread, self._remove)
            rest.push_async_callback(self._stack.aclose)
            rest.callback(self._close_users)
            await self._end()

    def _close_users(self) -> None:
        if self._users >= 0:
            os.close(self._users)
            self._users = -1

    def _remove(self) -> None:
        self.socket.unlink(missing_ok=True)
        remove_engine(self._folder, self._groups)
        if self._ids is not None:
            self._ids.close()
            self._ids = None


def remove_engine(folder: Path, groups: EngineGroups) -> None:
    """End and remove what is there of an engine that nobody looks after; blocks."""
    groups.kill()
    if not loops.wait_until_detached(folder, _DETACH_SECONDS):
        loops.detach_all(folder)
    if not groups.remove():
        _log.warning("session.engine.groups_stuck", engine_id=folder.name)
    with contextlib.suppress(FileNotFoundError):
        # Only files of ours; those of the engine are in the disk.
        shutil.rmtree(folder)

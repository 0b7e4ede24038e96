"""The first process of an engine: starting it by the launcher, its end, and its socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import offload_builder
from offload_builder.node.sessions.engine.record import EngineRecord, start_time
from offload_core.aio import TaskSet
from offload_core.errors import NodeLostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_builder.buildkit.daemon_log import DaemonLog
    from offload_builder.node.sessions.engine.groups import EngineGroups
    from offload_builder.node.sessions.engine.plan import NetworkPlan, Plan

_PACKAGES = str(Path(offload_builder.__path__[0]).parent)
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from offload_builder.node.sessions.engine.launch import main; main()"
)
_MAX_LINE = 1 << 16
_BACKLOG = 1024
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+~_-]{0,39}")
_MAX_HEAD = 1 << 14
_PATIENCE_SECONDS = 10.0
_FROZEN_SECONDS = 0.2
"""Whoever is not dead by then may be frozen: a container that is paused, or worse."""
_TAIL_LINES = 8


class EngineProcess:
    """One life of an engine, from a start to its end.

    Args:
        log: what dockerd prints goes there.
        groups: that its processes are in.

    Attributes:
        pid: of the first process of its namespaces.
        ended: done when that has ended, with its exit code, negative for a signal.
        version: of the docker engine, when it is ready.
    """

    def __init__(self, log: DaemonLog, groups: EngineGroups) -> None:
        self._log = log
        self._groups = groups
        self._process = -1
        self._tasks = TaskSet()
        self.pid = 0
        self.version = ""
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def start(
        self,
        plan: Plan,
        address: Path,
        network: Callable[[str], Awaitable[NetworkPlan]],
        keep: Callable[[EngineRecord], None],
    ) -> None:
        """Return when the engine answers. On an error or cancellation, `kill` it.

        Must be called in the thread that lives as long as this process: the engine ends with it.

        Args:
            plan: of the start; its `listener` is set here.
            address: of its socket.
            network: is told a path of the users' namespace, and returns the network.
            keep: keeps the record of the first process.

        Raises:
            NodeLostError: it does not start; the sentence says why.
        """
        read, write = os.pipe()
        output = asyncio.StreamReader(limit=_MAX_LINE)
        try:
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read, "rb", 0)
            )
            self._tasks.start(self._log.copy(output), name="engine-log")
            with _listen(address) as listener:
                os.set_inheritable(listener.fileno(), True)
                launcher = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", "-c", _PROGRAM, _PACKAGES,
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=write,
                    pass_fds=(listener.fileno(),), limit=_MAX_LINE, start_new_session=True,
                )  # fmt: skip
                plan = {**plan, "listener": listener.fileno()}
        finally:
            os.close(write)
        try:
            await self._talk(launcher, plan, network, keep)
        except OSError as error:
            raise self._failed(str(error)) from error
        finally:
            await _end(launcher)
            if not self.pid:
                # It may have got so far unheard.
                await self._catch_up(launcher)
        await self._wait_ready(address)

    async def _talk(
        self,
        launcher: asyncio.subprocess.Process,
        plan: Plan,
        network: Callable[[str], Awaitable[NetworkPlan]],
        keep: Callable[[EngineRecord], None],
    ) -> None:
        await _tell(launcher, plan)
        users = str((await self._hear(launcher))["users"])
        await _tell(launcher, await network(users))
        self._watch(int((await self._hear(launcher))["pid"]))
        keep(EngineRecord(self.pid, start_time(self.pid)))
        await _tell(launcher, {})
        if launcher.stdout is not None and (rest := await launcher.stdout.read(_MAX_LINE)):
            self._check(json.loads(rest))

    async def _hear(self, launcher: asyncio.subprocess.Process) -> dict[str, Any]:
        line = await launcher.stdout.readline() if launcher.stdout is not None else b""
        if not line:
            raise self._failed("its launcher ended")
        return self._check(json.loads(line))

    def _check(self, heard: dict[str, Any]) -> dict[str, Any]:
        if "error" in heard:
            raise self._failed(str(heard["error"]))
        return heard

    def _failed(self, why: str) -> NodeLostError:
        tail = self._log.tail(_TAIL_LINES)
        return NodeLostError(
            f"the docker engine did not start: {why}" + (f"\n{tail}" if tail else "")
        )

    async def _catch_up(self, launcher: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                if launcher.stdout is not None:
                    for line in (await launcher.stdout.read()).splitlines():
                        if pid := int(json.loads(line).get("pid", 0)):
                            self._watch(pid)

    def _watch(self, pid: int) -> None:
        """Note when the process ends. It is our child, so its number stays until then."""
        self._process = os.pidfd_open(pid)
        self.pid = pid
        asyncio.get_running_loop().add_reader(self._process, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process)
        try:
            _, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            code = -signal.SIGKILL
        os.close(self._process)
        self._process = -1
        if not self.ended.done():
            self.ended.set_result(code)

    async def _wait_ready(self, address: Path) -> None:
        asking = asyncio.ensure_future(ask_version(address))
        try:
            await asyncio.wait((asking, self.ended), return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                await self._tasks.drain(1.0)
                raise self._failed(f"dockerd ended with exit code {self.ended.result()}")
            self.version = await asking
        except OSError as error:
            # The socket goes a moment before the process.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await asyncio.shield(self.ended)
            raise self._failed(f"dockerd does not answer ({error})") from error
        finally:
            asking.cancel()

    def describe_late(self, seconds: float) -> NodeLostError:
        """Return the error for a start that took too long."""
        return self._failed(f"it did not answer within {seconds:g} s")

    def last_lines(self) -> str:
        """Return what dockerd printed last."""
        return self._log.tail(_TAIL_LINES)

    async def stop(self, seconds: float) -> None:
        """Have dockerd end its containers and itself; after some time everything is killed."""
        if self._process >= 0:
            signal.pidfd_send_signal(self._process, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.shield(self.ended)
        await self.kill()

    async def kill(self) -> None:
        """End everything in its process namespace at once, and wait for that.

        Raises:
            NodeLostError: it does not end.
        """
        if self._process >= 0:
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    while not self.ended.done():
                        await asyncio.wait((self.ended,), timeout=_FROZEN_SECONDS)
                        if not self.ended.done():
                            await asyncio.to_thread(self._groups.kill)
            except TimeoutError as error:
                raise NodeLostError("the processes of the docker engine do not end") from error
        # What was printed is in the pipe; its end comes with the last process.
        await self._tasks.drain(1.0)
        await self._tasks.close()


def _listen(address: Path) -> socket.socket:
    """Return the listening socket of an engine, made by us: its own root cannot replace it."""
    address.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(address))
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


async def _tell(launcher: asyncio.subprocess.Process, values: Any) -> None:
    if launcher.stdin is not None:
        launcher.stdin.write(json.dumps(values).encode() + b"\n")
        await launcher.stdin.drain()


async def _end(launcher: asyncio.subprocess.Process) -> None:
    if launcher.stdin is not None:
        launcher.stdin.close()
    if launcher.returncode is None:
        with contextlib.suppress(TimeoutError):
            # It ends by itself after its last word.
            async with asyncio.timeout(0.5):
                await launcher.wait()
    if launcher.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            launcher.kill()
        await launcher.wait()


async def ask_version(address: Path) -> str:
    """Return the version of the engine at a socket, as soon as it answers.

    Raises:
        OSError: it does not.
    """
    reader, writer = await asyncio.open_unix_connection(str(address), limit=_MAX_HEAD)
    try:
        writer.write(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise ConnectionResetError("the connection was closed") from error
    finally:
        writer.close()
    if " 200 " not in head[0]:
        raise OSError(f"it answers {head[0]}")
    server = next((line for line in head if line.lower().startswith("server:")), "")
    version = server.partition("/")[2].partition(" ")[0]
    # Whoever has had the engine may have it answer anything after a pause.
    return version if _VERSION.fullmatch(version) else ""

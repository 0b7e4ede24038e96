"""One supervised buildkitd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.buildkit.client import BuildkitClient, DaemonInfo
from offload_builder.buildkit.daemon_config import (
    DaemonSettings,
    daemon_toml,
    find_buildkitd,
    find_runc,
    log_environment,
)
from offload_builder.buildkit.daemon_exit import DaemonExit, count_oom_kills
from offload_builder.buildkit.daemon_leftovers import end_leftovers, end_previous_daemon
from offload_builder.buildkit.daemon_log import DaemonLog
from offload_builder.buildkit.daemon_rundir import make_private, run_directory
from offload_builder.buildkit.runcwrapper import write_runc_wrapper
from offload_core.aio import TaskSet, finish
from offload_core.errors import ConfigError, NodeLostError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

_log = structlog.get_logger(__name__)
_POLL_SECONDS = 0.02


class BuildkitDaemon:
    """A buildkitd with a root directory and a socket of its own.

    `async with` makes it ready to be started and stops it at the end; `ensure_running` starts it,
    also after it has died. It dies with this process, even by SIGKILL.

    Attributes:
        client: its control API.
        socket_path: its socket.
    """

    def __init__(self, settings: DaemonSettings, *, start_timeout: float = 30.0) -> None:
        self.settings = settings
        self._start_timeout = start_timeout
        self._run_dir = run_directory(settings.root)
        self.socket_path = self._run_dir / "bk.sock"
        self.client = BuildkitClient(self.socket_path, explain_loss=self._explain_loss)
        self._log = DaemonLog(settings.root / "buildkitd.log")
        self._tasks = TaskSet()
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._runc: Path | None = None
        self._stopping = False
        self._exit: asyncio.Future[DaemonExit] | None = None
        self.info: DaemonInfo | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await finish(self._close(), 60.0)

    async def _close(self) -> None:
        await self.stop()
        await self.client.close()
        await self._tasks.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether the process runs and is ready."""
        return self.info is not None and self._exit is not None and not self._exit.done()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def exited(self) -> asyncio.Future[DaemonExit]:
        """The end of the latest process; do not cancel it, use `asyncio.shield`.

        Raises:
            NodeLostError: it was never started.
        """
        if self._exit is None:
            raise NodeLostError("buildkitd was not started")
        return self._exit

    def log_tail(self, lines: int = 40) -> str:
        """Return its last lines."""
        return self._log.tail(lines)

    async def ensure_running(self) -> DaemonInfo:
        """Start the daemon if it does not run; return when it answers.

        Raises:
            ConfigError: buildkitd or runc is missing.
            NodeLostError: it ended or did not answer in time; the message has its last lines.
        """
        async with self._starting:
            if self.info is not None and self.running:
                return self.info
            try:
                self.info = await self._start()
            except BaseException:
                await finish(self._stop_process(2.0), 20.0)
                raise
            return self.info

    async def restart(self) -> DaemonInfo:
        """Stop and start again; running builds are lost.

        Raises:
            NodeLostError: see `ensure_running`.
        """
        await self.stop()
        return await self.ensure_running()

    async def stop(self, grace: float = 10.0) -> None:
        """Stop the daemon; builds are cancelled, after `grace` seconds it is killed."""
        async with self._starting:
            await self._stop_process(grace)

    async def wipe_ingest(self) -> int:
        """Delete content whose download has not ended, and return how many downloads these were.

        Needed after a digest mismatch: the daemon would resume from the wrong bytes for ever.
        Only while no build runs; the daemon may run.
        """
        return await asyncio.to_thread(_wipe_ingest, self.settings.root)

    # The process.

    async def _start(self) -> DaemonInfo:
        settings = self.settings
        binary = find_buildkitd(settings.binary, settings.search)
        self._runc = find_runc(settings.runc)
        settings.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        pid_file = settings.root / "buildkitd.pid"
        await end_previous_daemon(pid_file, settings.root)
        await end_leftovers(settings.root, self._runc)
        make_private(self._run_dir)
        self.socket_path.unlink(missing_ok=True)
        config = settings.root / "buildkitd.toml"
        wrapper = write_runc_wrapper(settings.root, self._runc, settings.gate)
        config.write_text(daemon_toml(settings, self.socket_path, wrapper))
        self._stopping, self.info = False, None
        process = await asyncio.create_subprocess_exec(
            *self._command(binary, config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                **inherited_environment(os.environ, settings.withheld),
                **log_environment(settings),
                **settings.environment,
            },
            start_new_session=True,
        )
        self._process = process
        self._exit = asyncio.get_running_loop().create_future()
        self._tasks.start(self._watch(process, self._exit), name="buildkitd")
        pid_file.write_text(f"{process.pid}\n")
        info = await self._wait_ready(self._exit)
        _log.info(
            "buildkit.daemon.started",
            pid=process.pid,
            root=str(settings.root),
            version=info.version,
        )
        return info

    def _command(self, binary: Path, config: Path) -> list[str]:
        dies_with_us = ["setpriv", "--pdeathsig", "KILL", "--"]
        prefix: Sequence[str] = self.settings.command_prefix
        # A prefix that forks would not pass the request on to its child.
        return [
            *dies_with_us,
            *(prefix and (*prefix, *dies_with_us)),
            str(binary),
            f"--config={config}",
            f"--root={self.settings.root}",
        ]

    async def _watch(
        self, process: asyncio.subprocess.Process, done: asyncio.Future[DaemonExit]
    ) -> None:
        # The daemon began in our group, and is gone when its own could be asked for.
        oom_before = count_oom_kills(os.getpid())
        copying = self._tasks.start(self._log.copy(_pipe_of(process)), name="buildkitd-log")
        status = await process.wait()
        # Helpers of the daemon are in its group.
        _signal_group(process.pid, signal.SIGKILL)
        # Steps that outlive the daemon hold the pipe open.
        await asyncio.wait((copying,), timeout=0.5)
        copying.cancel()
        killed = status == -signal.SIGKILL and not self._stopping
        ended = DaemonExit(
            code=status if status >= 0 else None,
            signal=-status if status < 0 else None,
            expected=self._stopping,
            out_of_memory=killed and count_oom_kills(os.getpid()) > oom_before,
            log_tail=self._log.tail(),
        )
        self.info = None
        if not done.done():
            done.set_result(ended)
        if not ended.expected:
            _log.error("buildkit.daemon.died", pid=process.pid, cause=ended.describe())

    async def _wait_ready(self, ended: asyncio.Future[DaemonExit]) -> DaemonInfo:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout
        while (left := deadline - loop.time()) > 0:
            if ended.done():
                text = f"{ended.result().describe()}\n{self._log.tail(15)}"
                raise NodeLostError(f"buildkitd could not be started: {text}")
            if self.socket_path.exists():
                with contextlib.suppress(NodeLostError):
                    return await self.client.info(timeout=left)
            await asyncio.sleep(_POLL_SECONDS)
        raise NodeLostError(
            f"buildkitd did not answer within {self._start_timeout:g} seconds;"
            f" its last lines: {self._log.tail(15)}"
        )

    async def _stop_process(self, grace: float) -> None:
        process, ended = self._process, self._exit
        if process is None or ended is None:
            return
        if not ended.done():
            self._stopping = True
            # Its graceful stop waits for calls, and so for builds. Ours end with their connection.
            await self.client.close()
            # To the group: a command prefix may have forked.
            _signal_group(process.pid, signal.SIGTERM)
            await asyncio.wait((ended,), timeout=grace)
        if not ended.done():
            _signal_group(process.pid, signal.SIGKILL)
            await asyncio.wait((ended,), timeout=10.0)
        self._process, self.info = None, None
        if self._runc is not None:
            await end_leftovers(self.settings.root, self._runc)
        (self.settings.root / "buildkitd.pid").unlink(missing_ok=True)

    async def _explain_loss(self) -> str:
        """Return the cause of a lost connection; the end of the process may be seen after it."""
        if self._exit is None:
            return "buildkitd was not started"
        if self._stopping:
            return "buildkitd was stopped"
        await asyncio.wait((self._exit,), timeout=1.0)
        return self._exit.result().describe() if self._exit.done() else ""


def inherited_environment(
    environment: Mapping[str, str], withheld: Collection[str] = ()
) -> dict[str, str]:
    """Return what a daemon may know of our environment.

    Not our settings, among them the keys of the shared store; not logins at registries; and not
    the keys of a cloud, which BuildKit's own S3 and Azure caches would use for anybody who names a
    bucket.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("OFFLOAD_", "AWS_", "AZURE_", "DOCKER_AUTH_CONFIG"))
        and name not in withheld
    }


def _pipe_of(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise ConfigError("buildkitd was started without a pipe for its output")
    return process.stdout


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _wipe_ingest(root: Path) -> int:
    count = 0
    for ingest in root.glob("runc-*/content/ingest/*"):
        shutil.rmtree(ingest, ignore_errors=True)
        count += 1
    return count

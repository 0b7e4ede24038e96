"""Child processes of `offload-builder up`: nodes and MinIO, supervised, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_core.aio import finish
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

log = structlog.get_logger(__name__)

RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
KILL_SECONDS = 10.0
_TAIL_BYTES = 16 << 10
STABLE_SECONDS = 30.0
MINIO_VARIABLE = "OFFLOAD_MINIO"


@dataclass(frozen=True)
class ProcessSpec:
    """One child process."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_file: Path
    stop_seconds: float
    """After SIGTERM it gets so long before SIGKILL."""


class SupervisedProcess:
    """Runs a program and starts it again when it dies; an async context manager."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self.deaths = 0
        """How often it ended without having been asked to."""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def __aenter__(self) -> Self:
        """Start the process.

        Raises:
            ConfigError: it cannot be started.
        """
        await self._start()
        self._watching = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _start(self) -> None:
        try:
            self._spec.log_file.parent.mkdir(parents=True, exist_ok=True)
            with self._spec.log_file.open("ab") as output:
                # setpriv: the child must not outlive this process, whatever ends it. A session of
                # its own: Ctrl-C reaches this process only, which then stops its children in order.
                self._process = await asyncio.create_subprocess_exec(
                    *_parent_death_signal(),
                    *self._spec.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **self._spec.environment},
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigError(f"cannot start {self._spec.name}: {error}") from error
        log.info("process.started", process=self._spec.name, pid=self._process.pid)

    async def _watch(self) -> None:
        failures = 0
        while self._process is not None:
            began = asyncio.get_running_loop().time()
            code = await self._process.wait()
            lived = asyncio.get_running_loop().time() - began
            failures = 0 if lived > STABLE_SECONDS else failures + 1
            delay = RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)]
            log.error(
                "process.died",
                process=self._spec.name,
                exit_code=code,
                restart_seconds=delay,
                log_tail=self.log_tail(),
            )
            self.deaths += 1
            await asyncio.sleep(delay)
            try:
                await self._start()
            except ConfigError as error:
                # For example no memory for a process now; the dead one is waited for once more.
                log.error("process.start.failed", process=self._spec.name, error=error.message)

    def log_tail(self, lines: int = 5) -> str:
        """Return the last lines that the process printed."""
        with contextlib.suppress(OSError), self._spec.log_file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    async def stop(self) -> None:
        """End the process: SIGTERM, later SIGKILL. It is not started again."""
        if self._watching is not None:
            # First: it could be about to start the process again.
            self._watching.cancel()
            await asyncio.wait((self._watching,))
        process = self._process
        if process is None:
            return
        try:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._spec.stop_seconds):
                        await process.wait()
        finally:
            # Also when this is cancelled; and whatever the process has left in its group goes.
            if process.returncode is None:
                log.warning("process.killed", process=self._spec.name, pid=process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await finish(process.wait(), KILL_SECONDS)


async def stop_all(processes: Sequence[SupervisedProcess]) -> None:
    """Stop processes side by side, so that they drain together."""
    await asyncio.gather(*(process.stop() for process in processes))


def _parent_death_signal() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def node_process(
    node_id: str,
    settings: Mapping[str, str],
    log_file: Path,
    stop_seconds: float,
    *,
    config_file: Path | None = None,
) -> ProcessSpec:
    """Return the process of one node; `settings` are NodeConfig fields as texts.

    They hold above those of `config_file`.
    """
    more = ["--config", str(config_file)] if config_file is not None else []
    return ProcessSpec(
        name=node_id,
        command=[sys.executable, "-m", "offload_builder.cli.entry", "node", *more],
        environment={f"OFFLOAD_NODE_{key.upper()}": value for key, value in settings.items()},
        log_file=log_file,
        stop_seconds=stop_seconds,
    )


def find_minio() -> Path:
    """Return the MinIO server: OFFLOAD_MINIO, PATH, or this checkout's tools.

    Raises:
        ConfigError: there is none.
    """
    candidates = [os.environ.get(MINIO_VARIABLE), shutil.which("minio")]
    candidates.append(str(tools_directory() / "minio"))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise ConfigError(
        "MinIO is not installed; run 'make tools', put minio into PATH, or name it in "
        f"{MINIO_VARIABLE}; with --s3 URL any other S3 store can be used"
    )


def tools_directory() -> Path:
    """Return where `make tools` puts programs in a checkout."""
    return Path(__file__).resolve().parents[3] / ".tools" / "bin"


def minio_process(address: str, data: Path, access_key: str, secret_key: str) -> ProcessSpec:
    """Return the process of an embedded MinIO."""
    data.mkdir(parents=True, exist_ok=True)
    return ProcessSpec(
        name="minio",
        command=[str(find_minio()), "server", "--quiet", "--address", address, str(data / "s3")],
        environment={
            "MINIO_ROOT_USER": access_key,
            "MINIO_ROOT_PASSWORD": secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        },
        log_file=data / "minio.log",
        stop_seconds=10.0,
    )

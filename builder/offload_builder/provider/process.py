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

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

log = structlog.get_logger(__name__)

RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
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
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def __aenter__(self) -> Self:
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
        self._spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._spec.log_file.open("ab") as output:
            # setpriv: the child must not outlive this process, whatever ends it. A session of its
            # own: Ctrl-C reaches this process only, which then stops its children in order.
            self._process = await asyncio.create_subprocess_exec(
                *_parent_death_signal(),
                *self._spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._spec.environment},
                start_new_session=True,
            )
        log.info("process.started", process=self._spec.name, pid=self._process.pid)

    async def _watch(self) -> None:
        failures = 0
        while True:
            if self._process is None:
                return
            began = asyncio.get_running_loop().time()
            code = await self._process.wait()
            if self._stopping:
                return
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
            await asyncio.sleep(delay)
            self.restarts += 1
            await self._start()

    def log_tail(self, lines: int = 5) -> str:
        """Return the last lines that the process printed."""
        with contextlib.suppress(OSError):
            text = self._spec.log_file.read_bytes()[-16384:].decode("utf-8", "replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    async def stop(self) -> None:
        """End the process: SIGTERM, later SIGKILL."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(self._spec.stop_seconds):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))


def _parent_death_signal() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def node_process(
    node_id: str, settings: Mapping[str, str], log_file: Path, stop_seconds: float
) -> ProcessSpec:
    """Return the process of one node; `settings` are NodeConfig fields as texts."""
    return ProcessSpec(
        name=node_id,
        command=[sys.executable, "-m", "offload_builder.cli.entry", "node"],
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

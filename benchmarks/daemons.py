"""Processes that run for a benchmark; BuildKit, MinIO and engines are those of the tests."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from benchmarks.model import BenchmarkError
from tests.fixtures.minio import log_tail
from tests.fixtures.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".tools" / "bin"
START_SECONDS = 60.0
STOP_SECONDS = 30.0


def tool_environment(home: Path, **more: str) -> dict[str, str]:
    """Return a clean environment: nothing of the person who runs the benchmark leaks in."""
    path = f"{TOOLS}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", **more}


class Daemon:
    """One process with a log; a context manager. It dies with this process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str],
        ready: Callable[[], bool],
    ) -> None:
        self.name = name
        self._command = command
        self._log = log
        self._environment = environment
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; only while it runs."""
        if self._process is None:
            raise BenchmarkError(f"{self.name} does not run")
        return self._process.pid

    def log(self) -> str:
        """Return the end of its output."""
        return log_tail(self._log)

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(self._environment),
                start_new_session=True,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process is None or self._process.poll() is not None:
                raise BenchmarkError(f"{self.name} ended while it started:\n{self.log()}")
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self.name} did not start:\n{self.log()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it: SIGTERM, later SIGKILL to its group."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def registry(folder: Path) -> tuple[Daemon, str]:
    """Return a docker registry below `folder`, not yet started, and its address."""
    address = f"127.0.0.1:{free_port()}"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '{address}'}}\n"
    )
    daemon = Daemon(
        "docker-registry",
        ["docker-registry", "serve", config],
        log=folder / "log",
        environment=tool_environment(folder),
        ready=lambda: _answers(address),
    )
    return daemon, address


def _answers(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

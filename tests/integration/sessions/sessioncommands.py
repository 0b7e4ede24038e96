"""People at machines of their own, whose commands for sessions run as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tests.fixtures.gateway import RunningGateway

BIN = Path(sys.executable).parent
COMMAND_SECONDS = 90.0
CONFIG = '{\n\t"auths": {\n\t\t"r.example": {}\n\t},\n\t"zoom": 1\n}'


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Person:
    """Somebody with a home directory, who is logged in. Use as an async context manager."""

    def __init__(self, gateway: RunningGateway, token: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="osess-"))
        self.token = token
        self.gateway = gateway
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "OFFLOAD_RESIDENT": "0",
        }
        self.docker_config = self.home / ".docker/config.json"

    async def __aenter__(self) -> Self:
        self.docker_config.parent.mkdir()
        self.docker_config.write_text(CONFIG)
        self.docker_config.chmod(0o600)
        done = await self.run("login", f"https://{self.gateway.address}", "--token", self.token)
        assert done.code == 0, done.err
        return self

    async def __aexit__(self, *exc: object) -> None:
        for pid in self.helpers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.home)

    def helpers(self) -> list[int]:
        """Return the processes that serve sessions of this person."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                ours = any(word.startswith(os.fsencode(self.sessions)) for word in words)
                if ours and b"offload_client.sessions.launch" in words:
                    found.append(int(folder.name))
        return found

    @property
    def sessions(self) -> Path:
        """The directory with what this machine knows of sessions."""
        return self.home / ".local/state/offload/sessions"

    @property
    def names(self) -> list[str]:
        """The sessions of this machine."""
        if not self.sessions.is_dir():
            return []
        return sorted(one.name for one in self.sessions.iterdir() if one.is_dir())

    @property
    def context(self) -> str:
        """The docker context in use."""
        return str(json.loads(self.docker_config.read_text()).get("currentContext", ""))

    async def begin(
        self, *words: str, program: str = "offload", stdin: int | None = None, **environment: str
    ) -> asyncio.subprocess.Process:
        """Start a command."""
        path = BIN / program if (BIN / program).exists() else program
        return await asyncio.create_subprocess_exec(
            path, *words, cwd=self.home, env={**self.environment, **environment},
            stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def run(self, *words: str, **options: Any) -> Done:
        """Run a command to its end."""
        process = await self.begin(*words, **options)
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return Done(process.returncode or 0, out.decode(), err.decode())

    async def well(self, *words: str, **options: Any) -> str:
        """Run a command that must not fail; return its output."""
        done = await self.run(*words, **options)
        assert done.code == 0, (words, done)
        return done.out

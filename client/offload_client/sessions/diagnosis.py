"""What is known of a session that does not work, as files for whoever looks for the fault."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import platform
import shutil
import stat
import sys
import tarfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from offload_client.sessions.launch import asked
from offload_client.sessions.records import LOG_FILE, engine_socket, helper_socket
from offload_client.sessions.scrubbing import scrub
from offload_core import VERSION
from offload_core.errors import ConfigError, OffloadError
from offload_core.trust import split_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.sessions.attaching import Attachments
    from offload_client.sessions.records import SessionRecord
    from offload_client.settings import Settings

MAX_LOG_BYTES = 1 << 20
CHECK_SECONDS = 5.0
AWAY_SECONDS = 1.0
"""For a node that the helper cannot reach either."""
PROGRAM_SECONDS = 10.0
VARIABLES = ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "OFFLOAD_GATEWAY",
             "OFFLOAD_PROJECT", "OFFLOAD_CONFIG_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME",
             "HTTPS_PROXY", "NO_PROXY")  # fmt: skip
"""Those that change what commands do and are no secrets; of no other variable anything is told."""


class Diagnosis:
    """Collects texts about one session, or about this machine when there is none."""

    def __init__(
        self,
        invocation: Invocation,
        connections: Connections,
        local: Attachments,
        record: SessionRecord | None,
        settings: Settings | None,
    ) -> None:
        self._invocation = invocation
        self._connections = connections
        self._local = local
        self._record = record
        self._settings = settings
        self._texts: dict[str, str] = {}
        self._checks: list[str] = []

    async def run(self) -> Mapping[str, str]:
        """Return texts by the names of files; secrets are masked. What fails is told in them."""
        environment = self._invocation.environment
        self._json("machine.json", await self._machine())
        self._json("docker-context.json", self._context())
        if self._settings is not None:
            await self._gateway(self._settings)
        if self._record is not None:
            await self._session(self._record)
        self._texts["checks.txt"] = "\n".join(self._checks) + "\n"
        return {name: scrub(text, environment) for name, text in sorted(self._texts.items())}

    @property
    def problems(self) -> list[str]:
        """The checks that failed."""
        return [line for line in self._checks if not line.startswith("ok")]

    async def _machine(self) -> dict[str, Any]:
        environment = self._invocation.environment
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": VERSION,
            "python": sys.version.split()[0],
            "system": platform.platform(),
            "docker": (await self._program("docker", "--version")).strip(),
            "variables": {name: environment[name] for name in VARIABLES if name in environment},
            "sessions": [record.name for record in self._local.records()],
        }

    async def _program(self, *command: str) -> str:
        path = shutil.which(command[0], path=self._invocation.environment.get("PATH"))
        if path is None:
            return f"{command[0]} is not installed"
        process = await asyncio.create_subprocess_exec(
            path, *command[1:], stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(PROGRAM_SECONDS):
                output, _ = await process.communicate()
        except TimeoutError:
            return f"{command[0]} does not answer"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return output.decode("utf-8", "replace")

    def _context(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = {"current": self._local.contexts.current() or "default"}
            if self._record is not None:
                found["of_session"] = self._record.context
                found["host"] = self._local.contexts.host(self._record.context)
                overriding = self._local.contexts.overriding(self._record.context)
                found["overridden_by"] = overriding.variable if overriding else ""
        except OffloadError as error:
            return {"error": error.message}
        return found

    async def _gateway(self, settings: Settings) -> None:
        await self._check(
            f"TCP connection to the gateway at {settings.gateway}",
            lambda: _connect(settings.gateway),
        )

        async def ask() -> str:
            from offload_client.cli.sessionrows import session_view
            from offload_client.cli.sessionversion import versions
            from offload_client.sessions.gatewaycalls import SessionCalls

            self._json(
                "versions.json", await versions(self._invocation, settings, self._connections)
            )
            calls = await SessionCalls.open_for(self._invocation, settings, self._connections)
            if self._record is None:
                return "answers"
            place = await calls.open(self._record.session_id, keep_paused=True)
            self._json("session.json", session_view(place.session))
            for endpoint in place.endpoints:
                await self._check(
                    f"TCP connection to the node at {endpoint}",
                    lambda endpoint=endpoint: _connect(endpoint),  # type: ignore[misc]
                )
            return "answers"

        await self._check("calls to the gateway", ask, seconds=4 * CHECK_SECONDS)

    async def _session(self, record: SessionRecord) -> None:
        directory = self._local.directory(record.name)
        self._json("record.json", asdict(record))
        with contextlib.suppress(OSError):
            self._texts[LOG_FILE] = _tail(directory / LOG_FILE)
        for path in (directory, engine_socket(directory), helper_socket(directory)):
            self._checks.append(_described(path))
        status = await asked(directory, "status")
        self._checks.append(f"{'ok' if status else 'FAILED'}: the helper answers")
        if status is not None:
            self._json("helper-status.json", status)
            away = (
                status.get("reconnecting_since") is not None or status.get("state") == "connecting"
            )
            limit = AWAY_SECONDS if away else CHECK_SECONDS
            what = "docker engine through the session"
            await self._check(what, lambda: _ping(directory), seconds=limit)
            told = await asked(directory, "diagnose", timeout=2 * limit) or {}
            texts = told.get("texts")
            for name, text in (texts if isinstance(texts, dict) else {}).items():
                if name not in self._texts:
                    self._texts[f"session/{_safe(str(name))}"] = str(text)
            rest = {name: value for name, value in told.items() if name != "texts"}
            if rest:
                self._json("helper.json", rest)

    async def _check(
        self, what: str, work: Callable[[], Awaitable[str]], *, seconds: float = CHECK_SECONDS
    ) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                said = await work()
        except TimeoutError:
            self._checks.append(f"FAILED: {what}: no answer in {seconds:.0f} seconds")
        except OffloadError as error:
            self._checks.append(f"FAILED: {what}: {error.message}")
        except OSError as error:
            self._checks.append(f"FAILED: {what}: {error.strerror or error}")
        else:
            took = (time.monotonic() - began) * 1000
            self._checks.append(f"ok: {what}: {said} ({took:.0f} ms)")

    def _json(self, name: str, value: Mapping[str, Any]) -> None:
        self._texts[name] = json.dumps(value, indent=2, default=str) + "\n"


async def _connect(address: str) -> str:
    host, port = split_address(address)
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return "connected"


async def _ping(directory: Path) -> str:
    reader, writer = await asyncio.open_unix_connection(engine_socket(directory))
    try:
        writer.write(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        await writer.drain()
        line = await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if b" 200 " not in line:
        raise ConfigError(f"it answers {line[:80].decode('latin-1').strip()!r}")
    return "answers"


def _described(path: Path) -> str:
    try:
        status = path.lstat()
    except OSError as error:
        return f"FAILED: {path}: {error.strerror}"
    owned = status.st_uid == os.getuid()
    mark = "ok" if owned else "FAILED"
    return f"{mark}: {path} is there, mode {status.st_mode & 0o7777:04o}, owner {status.st_uid}"


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
        return file.read(MAX_LOG_BYTES).decode("utf-8", "replace")


def _safe(name: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in name)[:80] or "_"


def write_bundle(path: Path, folder: str, texts: Mapping[str, str]) -> None:
    """Write texts as an archive, readable by the user only.

    Args:
        path: of the archive; an existing file is replaced.
        folder: name of the directory in it.
        texts: by the names of their files.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        file = os.open(path, _ready_for_writing(path), 0o600)
        with (
            open(file, "wb") as stream,  # noqa: PTH123 - the mode counts from the first moment
            tarfile.open(fileobj=stream, mode="w:gz") as archive,
        ):
            for name, text in texts.items():
                data = text.encode("utf-8", "replace")
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(data))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _ready_for_writing(path: Path) -> int:
    """Return how a file is opened that is for its owner alone.

    In a directory for everybody, somebody may have put something there to get what is written.

    Raises:
        ConfigError: it is a link of another user.
        OSError: a file that is there cannot be removed.
    """
    flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
    try:
        status = path.lstat()
    except FileNotFoundError:
        return flags | os.O_EXCL
    if stat.S_ISREG(status.st_mode):
        path.unlink()
        return flags | os.O_EXCL
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path} is a link of another user")
    return flags | os.O_TRUNC

"""Starting the helper of a session: a process of its own that outlives the command.

Importing gRPC takes as long as a node takes to hand out an engine that is ready. So the process is
started when the command begins, imports what it needs, and waits on its standard input for the
word that there is a session; without it, it ends and has done nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from offload_client.resident.launch import KEPT_PREFIXES, KEPT_VARIABLES
from offload_client.sessions.control import HelperAwayError, ask_helper
from offload_client.sessions.records import LOCK_FILE, LOG_FILE, engine_socket, helper_socket
from offload_core.errors import ConfigError, InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

GO = b"go\n"
READY_SECONDS = 30.0
POLL_SECONDS = 0.02
STOP_SECONDS = 20.0
LAST_FILES_SECONDS = 75.0
"""A helper that ends fetches files for a minute at most."""
"""The helper may still bring files of containers here."""
_IDENTITY_PREFIXES = ("OFFLOAD_", "XDG_", "ACTIONS_ID_TOKEN_", "BUILDKITE_", "CIRCLE_OIDC_")
_IDENTITY_VARIABLES = frozenset(
    (
        "BUILDKITE", "BUILD_TAG", "CI", "CI_JOB_ID", "CIRCLECI", "CIRCLE_WORKFLOW_JOB_ID",
        "DOCKER_CONFIG", "GITHUB_ACTIONS", "GITHUB_JOB", "GITHUB_RUN_ATTEMPT", "GITHUB_RUN_ID",
        "GITLAB_CI",
    )
)  # fmt: skip
_PATH_VARIABLES = frozenset(
    (
        "DOCKER_CONFIG", "HOME", "OFFLOAD_CONFIG_DIR", "TMPDIR", "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME",
    )
)  # fmt: skip


def helper_environment(environment: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """Return what a helper gets of the environment: how it logs in, and nothing of other things.

    In a pipeline a login is a variable, and the helper has to log in again by itself.
    """
    prefixes = (*KEPT_PREFIXES, *_IDENTITY_PREFIXES)
    names = KEPT_VARIABLES | _IDENTITY_VARIABLES
    kept = {
        name: value
        for name, value in environment.items()
        if name in names or name.startswith(prefixes)
    }
    for name in kept.keys() & _PATH_VARIABLES:
        # The helper works elsewhere.
        if kept[name] and not kept[name].startswith("~"):
            kept[name] = str(cwd / kept[name])
    return kept


class HelperProcess:
    """A helper that waits for its session. Leaving the block without `go` ends it."""

    def __init__(self, directory: Path, environment: Mapping[str, str], cwd: Path) -> None:
        """Know where the session's record will be.

        Args:
            directory: of the session.
            environment: of the command.
            cwd: where the command was started.
        """
        self._directory = directory
        self._environment = helper_environment(environment, cwd)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the process.

        Raises:
            ConfigError: it cannot be started.
        """
        try:
            # It must not keep the terminal, the directory or the streams of this command.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "offload_client.sessions.launch", str(self._directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=self._environment,
                start_new_session=True,
                close_fds=True,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot start the helper of the session: {error.strerror}"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        if process.poll() is None:
            # It lives on without this command; no warning that nobody waits for it.
            process.returncode = 0

    async def go(self) -> None:
        """Tell it that the record is there, and wait until it answers.

        Raises:
            InternalError: it does not answer within 30 seconds, or has ended.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise InternalError("the helper of the session was not started")
        with contextlib.suppress(OSError):
            process.stdin.write(GO)
            process.stdin.flush()
        try:
            async with asyncio.timeout(READY_SECONDS):
                while process.poll() is None:
                    if await helper_answers(self._directory):
                        return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            process.terminate()
        if process.returncode == 0 and await helper_answers(self._directory):
            # There was one already.
            return
        raise InternalError(
            "the helper of the session did not start",
            hint=self._last_words() or f"see {self._directory / LOG_FILE}",
        )

    def _last_words(self) -> str:
        """Return the end of its log, which goes with the session's directory."""
        try:
            lines = (self._directory / LOG_FILE).read_text("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-3:])


async def helper_answers(directory: Path) -> bool:
    """Return whether the helper of a session lives and serves docker's socket."""
    if not engine_socket(directory).exists():
        return False
    return await asked(directory, "status") is not None


async def asked(directory: Path, do: str, *, timeout: float = 5.0) -> dict[str, Any] | None:
    """Return a helper's answer; None when none answers in time."""
    from offload_client.bytepipe import in_thread

    try:
        return await in_thread(
            lambda: ask_helper(helper_socket(directory), do, timeout=timeout), name="ask-helper"
        )
    except HelperAwayError:
        return None


async def end_helper(directory: Path) -> list[str]:
    """End the helper of a session, which first brings back what containers wrote.

    Nothing happens when there is none. One that does not end goes when its record goes.

    Returns:
        Sentences about what it could not bring back.
    """
    answer = await asked(directory, "stop", timeout=LAST_FILES_SECONDS)
    if answer is None:
        return []
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if not _lives(directory):
            break
        await asyncio.sleep(POLL_SECONDS)
    return [str(warning) for warning in answer.get("warnings") or ()]


def _lives(directory: Path) -> bool:
    """Return whether a helper has its lock, which it keeps longer than its sockets."""
    try:
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def main() -> None:
    """Be the helper of the session in the directory given, once there is a session."""
    from offload_client.sessions import helper

    if sys.stdin.buffer.readline() != GO:
        return
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    helper.main()


if __name__ == "__main__":
    main()

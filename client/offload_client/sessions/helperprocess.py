"""Starting the helper of a session: a process of its own that outlives the command.

Importing gRPC takes as long as a node takes to hand out an engine that is ready. So the process is
started when the command begins, imports what it needs, and waits on its standard input for the
name of a session; without one, it ends and has done nothing. The imports of this module are few for
the same reason.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from offload_client.resident.launch import KEPT_PREFIXES, KEPT_VARIABLES
from offload_core.errors import ConfigError, InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

READY_SECONDS = 30.0
POLL_SECONDS = 0.01
_MODULE = "offload_client.sessions.launch"
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
# Buffers that come and go are not given back to the system each time; mallopt(3).
_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_early: list[subprocess.Popen[bytes]] = []
"""At most one, which no command has taken yet."""


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
        self._environment = environment
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the process, or take the one that was started early.

        Raises:
            ConfigError: it cannot be started.
        """
        if _early:
            self._process = _early.pop()
            return self
        try:
            self._process = _start(self._directory.parent, self._environment, self._cwd)
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
        if self._process is not None:
            _leave(self._process)

    async def go(self) -> None:
        """Tell it that the record is there, and wait until it answers.

        Raises:
            InternalError: it does not answer within 30 seconds, or has ended.
        """
        import asyncio

        from offload_client.sessions.launch import helper_answers
        from offload_client.sessions.records import LOG_FILE

        process = self._process
        if process is None or process.stdin is None:
            raise InternalError("the helper of the session was not started")
        with contextlib.suppress(OSError):
            process.stdin.write(os.fsencode(self._directory.name) + b"\n")
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
            hint=self._last_words(LOG_FILE) or f"see {self._directory / LOG_FILE}",
        )

    def _last_words(self, log: str) -> str:
        """Return the end of its log, which goes with the session's directory."""
        try:
            lines = (self._directory / log).read_text("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-3:])


@contextmanager
def early_helper(sessions: Path, environment: Mapping[str, str], cwd: Path) -> Iterator[None]:
    """Start a helper for the session that a command starts in the block, if it does.

    Args:
        sessions: directory of all sessions.
        environment: of the command.
        cwd: where it was started.
    """
    # Where it cannot be started, whoever needs it says so.
    with contextlib.suppress(OSError):
        _early.append(_start(sessions, environment, cwd))
    try:
        yield
    finally:
        while _early:
            _leave(_early.pop())


def _start(sessions: Path, environment: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
    # It must not keep the terminal, the directory or the streams of this command.
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE, str(sessions)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=helper_environment(environment, cwd) | _MEMORY,
        start_new_session=True,
        close_fds=True,
    )


def _leave(process: subprocess.Popen[bytes]) -> None:
    """Say nothing more to a helper: one that still waits for a name ends."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    if process.poll() is None:
        # It lives on without this command; no warning that nobody waits for it.
        process.returncode = 0

"""One process per data directory: two that share one would destroy each other's data."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Self

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

LOCK_FILE = "lock"
POLL_SECONDS = 0.1


class DataLock:
    """Holds a data directory for this process; the kernel gives it back however the process ends.

    Args:
        folder: the directory; created when missing.
        user: who wants it, for the sentence, for example "offload-builder up".
        patience: seconds to wait for a predecessor that is about to end.
    """

    def __init__(self, folder: Path, user: str, *, patience: float = 0.0) -> None:
        self._folder = folder
        self._user = user
        self._patience = patience
        self._file = -1

    async def __aenter__(self) -> Self:
        """Take the lock.

        Raises:
            ConfigError: another process has it, or the directory cannot be used.
        """
        deadline = asyncio.get_running_loop().time() + self._patience
        while not self._take():
            if asyncio.get_running_loop().time() >= deadline:
                raise ConfigError(
                    f"{self._folder} is in use by {self._holder()}; stop it first, or give "
                    f"{self._user} another data directory"
                )
            await asyncio.sleep(POLL_SECONDS)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self) -> bool:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
            file = os.open(self._folder / LOCK_FILE, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot use the data directory {self._folder}: {error.strerror}"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        # Only for the sentence above; a disk that is full does not matter here.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file
        return True

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            text = (self._folder / LOCK_FILE).read_text().strip()
            if text.isdigit():
                return f"process {text}"
        return "another process"

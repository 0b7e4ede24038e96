"""Writing results at the client: checked before the build, whole or not at all, never stuck.

A destination that cannot work is refused before anything is built. A file appears with its whole
content or not at all. Nothing here blocks a cancelled command: a pipe that nobody reads is
written only when it has room, by a thread that can be told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import stat
import threading
from typing import TYPE_CHECKING

from offload_client.bytepipe import in_thread
from offload_core.errors import ConfigError, InvalidValueError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    from offload_client.build.options import OutputOption
    from offload_client.invocation import Invocation

WAIT_MILLISECONDS = 200
STOP_SECONDS = 2.0
READ_BYTES = 1 << 20


def check_destinations(invocation: Invocation, outputs: Sequence[OutputOption]) -> None:
    """Refuse destinations that cannot be written, in docker's words.

    Raises:
        InvalidValueError: a terminal, a directory in the place of a file, or the reverse.
        ConfigError: the directory of a file cannot be written.
    """
    for output in outputs:
        if not output.dest:
            continue
        if output.dest == "-":
            if os.isatty(invocation.stdout.fileno()):
                raise InvalidValueError(
                    f"dest file is required for {output.type} exporter. "
                    "refusing to write to console"
                )
            continue
        path = invocation.path(output.dest)
        try:
            if output.type == "local":
                if path.exists() and not path.is_dir():
                    raise InvalidValueError(f"destination directory {path} is a file")
            else:
                check_file(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def check_file(path: Path) -> None:
    """Refuse a name that no file can get.

    Raises:
        InvalidValueError: it is a directory.
        ConfigError: its directory is missing or cannot be written.
    """
    try:
        if path.is_dir():
            raise InvalidValueError(f"destination file {path} is a directory")
        folder = path.parent
        if not folder.is_dir():
            problem = "is not a directory" if folder.exists() else "does not exist"
            raise ConfigError(f"cannot write {path}: {folder} {problem}")
        if is_special(path):
            return
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"cannot write {path}: {folder} is not writable")


def is_special(path: Path) -> bool:
    """Whether it is something to write into, not to replace: /dev/stdout, a named pipe."""
    return path.is_relative_to("/dev") or (path.exists() and not path.is_file())


def replace_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if is_special(path):
            with path.open("a") as file:
                file.write(text)
            return
        # What a link points to is replaced, not the link.
        path = path.resolve()
        scratch = _scratch(path)
        try:
            scratch.write_text(text)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


async def write_file(path: Path, stream: AsyncIterator[bytes]) -> None:
    """Write a stream to a file, which appears when it is complete.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        check_file(path)
        if is_special(path):
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                await write_descriptor(file, stream)
            finally:
                os.close(file)
            return
        path = path.resolve()
        scratch = _scratch(path)
        try:
            with scratch.open("xb", buffering=0) as target:
                await write_descriptor(target.fileno(), stream)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


async def read_file(path: Path) -> AsyncGenerator[bytes]:
    """Yield the content of a file of ours.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while data := await in_thread(lambda: file.read(READ_BYTES), name="read-file"):
                yield data
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


async def write_descriptor(file: int, stream: AsyncIterator[bytes]) -> None:
    """Write a stream to an open descriptor, which stays open.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OSError: it cannot be written.
    """
    async for data in stream:
        stop = threading.Event()
        writing = in_thread(lambda data=data, stop=stop: _write(file, data, stop), name="output")  # type: ignore[misc]
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The caller closes the descriptor next, and the number may get another meaning.
            stop.set()
            with contextlib.suppress(OSError):
                await asyncio.wait((writing,), timeout=STOP_SECONDS)
            raise


def _write(file: int, data: bytes, stop: threading.Event) -> None:
    view = memoryview(data)
    if stat.S_ISREG(os.fstat(file).st_mode):
        while view:
            view = view[os.write(file, view) :]
        return
    # A pipe that polls as writable takes PIPE_BUF bytes without blocking (POSIX, poll and write).
    poller = select.poll()
    poller.register(file, select.POLLOUT)
    while view and not stop.is_set():
        if poller.poll(WAIT_MILLISECONDS):
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(file, view[: select.PIPE_BUF]) :]


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")

"""Hears of every step of a BuildKit daemon before it runs, and can make it wait.

BuildKit runs each step with `runc run --bundle DIR ID`. The program that it takes for runc names
the bundle to the node through a pipe, waits for one line, and becomes the real runc. So a step
that is cached costs nothing here, and nothing has to be guessed of a build: the bundle says what
the step really mounts. Source: BuildKit's executor/runcexecutor, go-runc.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.buildkit.runcwrapper import DROPPED, restrict_step
from offload_core.aio import TaskSet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

_SHELL = """# Tells the node which step is about to run, and waits for its word.
if [ -n "$bundle" ] && [ -p {bell} ]; then
    set -C # what exists is not overwritten, so a file can be made by one only
    slot=0
    while [ $slot -lt {slots} ]; do
        taken={replies}/$slot.taken
        if [ ! -e "$taken" ] && true 2>/dev/null >"$taken"; then
            # Opened for both ways, a pipe never blocks a writer because nobody reads.
            echo "$$ $slot $bundle" 1<>{bell} && read -r answer <{replies}/$slot
            break
        fi
        slot=$((slot + 1))
    done
fi
"""

_MAX_LINE_BYTES = 8192
_GO = b"go\n"
_SLOTS = 64
"""Steps at once that are told; further ones run without."""


class Step:
    """A container that is about to run, runs, or has ended.

    Attributes:
        bundle: directory with its `config.json`.
        ended: set when its process is gone.
    """

    def __init__(self, pid: int, bundle: Path) -> None:
        self.pid = pid
        self.bundle = bundle
        self.ended = asyncio.Event()


class StepGate:
    """The pipe between a daemon's containers and the node; an async context manager.

    Args:
        folder: for the pipes; those of an earlier run are removed.
        before: called for every step; the step runs when it returns or fails.
    """

    def __init__(self, folder: Path, before: Callable[[Step], Awaitable[None]]) -> None:
        self._bell_path = folder / "bell"
        self._replies = folder / "replies"
        self._before = before
        self._tasks = TaskSet(self._crashed)
        self._bell = -1
        self._pending = b""

    @staticmethod
    def _crashed(name: str, error: BaseException) -> None:
        log.error("mounts.gate.failed", task=name, exc_info=error)

    @property
    def shell(self) -> str:
        """What the program in runc's place has to do before a step; see `write_runc_wrapper`."""
        return _SHELL.format(
            bell=shlex.quote(str(self._bell_path)),
            replies=shlex.quote(str(self._replies)),
            slots=_SLOTS,
        )

    async def __aenter__(self) -> Self:
        shutil.rmtree(self._replies, ignore_errors=True)
        self._replies.mkdir(parents=True, mode=0o700)
        for slot in range(_SLOTS):
            os.mkfifo(self._replies / str(slot), 0o600)
        self._bell_path.unlink(missing_ok=True)
        os.mkfifo(self._bell_path, 0o600)
        self._bell = os.open(self._bell_path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        asyncio.get_running_loop().add_reader(self._bell, self._ring)
        return self

    async def __aexit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        # Steps that come now run without asking.
        self._bell_path.unlink(missing_ok=True)
        loop.remove_reader(self._bell)
        os.close(self._bell)
        await self._tasks.close()
        # A step may have asked unheard, or not be at the point of listening yet. What is written
        # stays while the pipe is open; later there is none to wait for.
        with contextlib.ExitStack() as held:
            for slot in range(_SLOTS):
                with contextlib.suppress(OSError):
                    reply = _open_reply(self._replies / str(slot))
                    held.callback(os.close, reply)
                    os.write(reply, _GO)
            shutil.rmtree(self._replies, ignore_errors=True)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._pending += os.read(self._bell, 65536)
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            number, _, rest = line.partition(b" ")
            slot, _, path = rest.partition(b" ")
            if number.isdigit() and slot.isdigit() and path.startswith(b"/"):
                step = Step(int(number), Path(os.fsdecode(path)))
                self._tasks.start(self._serve(step, int(slot)), name=f"step {step.pid}")
        if len(self._pending) > _MAX_LINE_BYTES:
            self._pending = b""

    async def _serve(self, step: Step, slot: int) -> None:
        path = self._replies / str(slot)
        reply = pidfd = -1
        gone = False
        try:
            # Open for both ways until the end: the line stays until the script has read it.
            reply = _open_reply(path)
            pidfd = os.pidfd_open(step.pid)
            try:
                await self._before(step)
            except Exception as error:
                log.error("mounts.step.failed", bundle=str(step.bundle), exc_info=error)
            os.write(reply, _word(step))
            await _readable(pidfd)
            gone = True
        except ProcessLookupError:
            gone = True
            log.debug("mounts.step.gone", pid=step.pid)
        finally:
            step.ended.set()
            if reply >= 0:
                # Also when we are being closed: the step must not wait for ever.
                with contextlib.suppress(OSError):
                    os.write(reply, _GO)
                os.close(reply)
            if pidfd >= 0:
                os.close(pidfd)
            if gone:
                # What was not read goes with the last one who had the pipe open.
                path.with_name(f"{slot}.taken").unlink(missing_ok=True)


def _word(step: Step) -> bytes:
    """Return the answer to a step; any other word leaves the specification to the program."""
    with contextlib.suppress(OSError):
        if restrict_step(step.bundle / "config.json"):
            return f"{DROPPED} {step.pid}\n".encode()
    return _GO


def _open_reply(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)

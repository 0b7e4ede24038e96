"""Getting rendered output to the terminal without holding up the build.

The event loop of a command also serves the node's requests for files, so a slow terminal, a pager
or a paused pipe must not stop it: one thread per display renders and writes.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

# Output that waits for a reader that does not read. Above it the feeding side is slowed down, so
# that nothing is lost and memory stays bounded.
_PENDING_LIMIT_BYTES = 64 << 20
_CROWDED_BYTES = 8 << 20
"""Above this, who feeds from an event loop should wait for the reader there."""
_HURRY_BYTES = _CROWDED_BYTES // 4
"""Above this, the next write comes before its time."""


class Sink:
    """Writes bytes to a binary or a text stream, straight to its descriptor where it has one.

    A reader that went away (broken pipe, closed terminal) ends the output, not the build.

    Attributes:
        broken: writing failed; all later output is dropped.
    """

    def __init__(self, stream: IO[Any]) -> None:
        """Take a stream; it stays the caller's to close."""
        self._stream = stream
        self.broken = False
        self.descriptor = _descriptor(stream)
        self._owned = False
        self._text = not isinstance(stream, _binary_types()) and _is_text(stream)

    @property
    def is_terminal(self) -> bool:
        """Somebody may be looking at it."""
        return self.descriptor is not None and os.isatty(self.descriptor)

    def open(self) -> None:
        """Take a descriptor of our own, until `close`.

        A thread may still hang in a write when the caller closes its stream and the number is
        given to another file, for example the terminal of another command.
        """
        if self.descriptor is not None and not self._owned:
            try:
                self.descriptor = os.dup(self.descriptor)
            except OSError:
                self.broken = True
            else:
                self._owned = True

    def close(self) -> None:
        """Give up the descriptor; later output is dropped."""
        self.broken = True
        if self._owned and self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor, self._owned = None, False

    def write(self, data: bytes) -> None:
        """Write all of it; blocks as long as the reader does."""
        if not data or self.broken:
            return
        try:
            if self.descriptor is None:
                self._write_object(data)
            else:
                self._stream.flush()
                self._write_descriptor(self.descriptor, data)
        except (OSError, ValueError):
            # ValueError: the stream was closed by its owner.
            self.broken = True

    def _write_object(self, data: bytes) -> None:
        if self._text:
            cast("IO[str]", self._stream).write(data.decode("utf-8", "replace"))
        else:
            cast("IO[bytes]", self._stream).write(data)
        self._stream.flush()

    def _write_descriptor(self, descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        while view and not self.broken:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                # Another program that shares the terminal has made it non-blocking.
                poller = select.poll()
                poller.register(descriptor, select.POLLOUT)
                poller.poll(1000)


def _descriptor(stream: IO[Any]) -> int | None:
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return stream.fileno()
    return None


def _binary_types() -> tuple[type, ...]:
    import io

    return (io.RawIOBase, io.BufferedIOBase)


def _is_text(stream: IO[Any]) -> bool:
    import io

    return isinstance(stream, io.TextIOBase)


class Pump:
    """Calls `render` in a thread of its own, at most once per interval, and writes the result.

    `lock` guards the state that `render` reads; it is never held while writing.
    """

    def __init__(
        self,
        sink: Sink,
        render: Callable[[], bytes],
        *,
        interval_seconds: float,
        tick_seconds: float | None,
    ) -> None:
        """Prepare the thread; it starts with the first `changed`.

        Args:
            sink: where the output goes.
            render: returns what is to be written now; called with `lock` held.
            interval_seconds: least time between two writes.
            tick_seconds: render after this time also when nothing changed; None for never.
        """
        self.lock = threading.Lock()
        self._sink = sink
        self._render = render
        self._interval_seconds = interval_seconds
        self._tick_seconds = tick_seconds
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._closing = threading.Event()
        self._written = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last: Callable[[], bytes] | None = None
        self._failure: Exception | None = None
        self._pending_bytes = 0

    @property
    def crowded(self) -> bool:
        """Much output waits for the reader; the one who feeds should pause."""
        return (
            self._pending_bytes > _CROWDED_BYTES
            and not self._sink.broken
            and not self._closing.is_set()
        )

    def changed(self, pending_bytes: int = 0) -> None:
        """Tell that there is something to render; call without `lock`.

        Args:
            pending_bytes: output that waits; above 64 MiB this call waits for the writer.
        """
        self._pending_bytes = pending_bytes
        if pending_bytes > _HURRY_BYTES:
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()
        thread = self._started()
        if pending_bytes > _PENDING_LIMIT_BYTES:
            with self._written:
                if thread.is_alive() and not self._closing.is_set():
                    self._written.wait(1.0)

    def close(self, last: Callable[[], bytes], timeout_seconds: float | None = None) -> None:
        """Write what `last` returns, after all that was written before, and end the thread.

        Args:
            last: called once, with `lock` held.
            timeout_seconds: give up on a reader that does not read; None waits for it.

        Raises:
            Exception: what rendering raised in the thread.
        """
        self._last = last
        self._closing.set()
        self._hurry.set()
        self._wake.set()
        thread = self._started()
        thread.join(timeout_seconds)
        if thread.is_alive():
            # It is a daemon thread that waits for the reader; what it holds is dropped.
            self._sink.broken = True
        elif self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def give_up(self, timeout_seconds: float) -> None:
        """Wait a last time for a reader while another thread is in `close`, then drop the rest."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
            if thread.is_alive():
                self._sink.broken = True

    def _started(self) -> threading.Thread:
        thread = self._thread
        if thread is None:
            with self.lock:
                thread = self._thread
                if thread is None:
                    thread = threading.Thread(
                        target=self._run, name="offload-progress", daemon=True
                    )
                    self._thread = thread
                    self._sink.open()
                    thread.start()
        return thread

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(self._tick_seconds)
            self._wake.clear()
            self._hurry.clear()
            if self._closing.is_set() or not self._write(self._render):
                break
            self._hurry.wait(self._interval_seconds)
        self._closing.wait()
        if self._last is not None:
            self._write(self._last)
        self._sink.close()

    def _write(self, render: Callable[[], bytes]) -> bool:
        try:
            with self.lock:
                data = render()
                self._pending_bytes = 0
            self._sink.write(data)
        except Exception as failure:  # noqa: BLE001 - raised again by close()
            self._failure = failure
            return False
        finally:
            with self._written:
                self._written.notify_all()
        return True

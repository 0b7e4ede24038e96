"""The step that shows why a build waits; there is none when it does not."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from offload_client.progress.display import Display
    from offload_client.progress.local import LocalStep
    from offload_proto.v1.builds_service_pb2 import Queued


class QueueStep:
    """Shows position and reason from the first message of the queue on."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._stack = ExitStack()
        self._step: LocalStep | None = None
        self._said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def queued(self, message: Queued) -> None:
        """Show one update of the queue."""
        if message.position <= 0:
            return
        if self._step is None:
            name = "[offload] waiting for a node"
            self._step = self._stack.enter_context(self._display.local_step(name))
        text = f"queue position {message.position}: {message.reason}"
        if text != self._said:
            self._said = text
            self._step.log(text)

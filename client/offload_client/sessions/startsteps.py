"""The steps that show how a session starts: waiting for a node, then for its engine."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from offload_client.progress.display import Display
    from offload_client.progress.local import LocalStep
    from offload_proto.v1.sessions_service_pb2 import SessionQueued, SessionStarting

WAITING = "[offload] waiting for a node"


class StartSteps:
    """Shows the news of one session that starts.

    Attributes:
        reason: why it waited last; empty when it did not.
    """

    def __init__(self, display: Display) -> None:
        self.reason = ""
        self._display = display
        self._stack = ExitStack()
        self._step: LocalStep | None = None
        self._name = ""
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

    def queued(self, message: SessionQueued) -> None:
        """Show its place in the queue."""
        self.reason = message.reason
        step = self._enter(WAITING)
        text = f"queue position {message.position}: {message.reason}"
        if text != self._said:
            self._said = text
            step.log(text)

    def starting(self, message: SessionStarting) -> None:
        """Show its node."""
        self._enter(f"[offload] starting an engine on node {message.node_id}")

    def ready(self) -> None:
        """Show that it is there."""
        self._stack.close()
        self._step = None

    def _enter(self, name: str) -> LocalStep:
        if self._step is None or name != self._name:
            self._stack.close()
            self._name = name
            self._step = self._stack.enter_context(self._display.local_step(name))
        return self._step

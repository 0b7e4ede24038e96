"""The plain form, for logs and pipes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload_client.progress.base import ViewDisplay
from offload_client.progress.printer import PlainPrinter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.progress.output import Sink
    from offload_client.progress.step import Step
    from offload_proto.v1.node_service_pb2 import Failure

# How long a step that waits for its turn can be overlooked when nothing else happens.
_TICK_SECONDS = 0.5


class PlainDisplay(ViewDisplay):
    """Prints numbered lines, at most ten times a second; every line is printed."""

    def __init__(
        self, sink: Sink, environment: Mapping[str, str], *, expand_warnings: bool = False
    ) -> None:
        """Print to any stream.

        Args:
            sink: where the output goes.
            environment: PROGRESS_NO_TRUNC=0 cuts long step names, as in BuildKit.
            expand_warnings: give warnings with their details at the end.
        """
        super().__init__(sink, expand_warnings=expand_warnings, tick_seconds=_TICK_SECONDS)
        self._printer = self._make_printer(
            truncate_names=environment.get("PROGRESS_NO_TRUNC") == "0"
        )

    def _make_printer(self, *, truncate_names: bool) -> PlainPrinter:
        return PlainPrinter(self.view, truncate_names=truncate_names)

    def _notice(self, level: str, text: str) -> None:
        self._printer.interject(f"WARNING: {text}" if level == "warning" else text)

    def _settle(self) -> None:
        self.view.reveal_all()
        self._printer.settle(time.monotonic())

    def _render(self) -> bytes:
        return self._printer.render(time.monotonic())

    def _final(self, failure: Failure | None) -> bytes:
        self.view.reveal_all()
        # A build that failed has no list of warnings at its end.
        late = failure is not None
        data = self._printer.render(time.monotonic(), final=True, late_warnings=late)
        return data + self._ending(failure)

    def _log_tail(self, step: Step) -> list[bytes]:
        return self._printer.tail_of(step)

"""Events of the client's inner parts, on their way to the person at the terminal.

A command has no log of its own: standard output is for results and standard error belongs to the
display of the build. So warnings become notices of the running build, and everything else is
shown with OFFLOAD_DEBUG=1 only. The resident helper runs builds of several terminals at once;
each build's events go to its own display, because the receiver is a context variable.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_receiver: ContextVar[tuple[Callable[[str, str], None], bool] | None] = ContextVar(
    "offload_event_receiver", default=None
)


class EventLog:
    """Takes events named `<thing>.<past participle>` with values, as structlog's loggers do."""

    def debug(self, event: str, **values: object) -> None:
        """Tell a detail."""
        self._tell("debug", event, values)

    def info(self, event: str, **values: object) -> None:
        """Tell of the normal course of things."""
        self._tell("info", event, values)

    def warning(self, event: str, **values: object) -> None:
        """Tell of something that works, but not as well as it should."""
        self._tell("warning", event, values)

    @staticmethod
    def _tell(level: str, event: str, values: dict[str, Any]) -> None:
        receiver = _receiver.get()
        if receiver is None:
            return
        notice, everything = receiver
        if level != "warning" and not everything:
            return
        from offload_core.redaction import redact_values

        redact_values(values)
        name = event if everything else event.replace(".", " ").replace("_", " ")
        details = ", ".join(f"{key}={value}" for key, value in values.items())
        notice("warning" if level == "warning" else "info", f"{name} ({details})")


_log = EventLog()


def get_logger() -> EventLog:
    """Return the log of the running command."""
    return _log


def show_events(notice: Callable[[str, str], None], *, everything: bool) -> None:
    """Send the events of this task, and of tasks and threads that it starts, to a display.

    Args:
        notice: takes "info" or "warning" and one line.
        everything: also what is no warning.
    """
    _receiver.set((notice, everything))

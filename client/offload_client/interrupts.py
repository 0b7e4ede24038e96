"""Ctrl-C: it ends a command, unless the command wants to ask first."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Interrupts:
    """Stands between the signal and the command that it would end.

    Attributes:
        cancel: ends the command; set by whoever runs it.
        answered: called when an interrupt did not end the command, so that the next one comes
            as well.
    """

    def __init__(self, above: Interrupts | None = None) -> None:
        """Know no handler.

        Args:
            above: of the command that this one is a part of; None for a whole command.
        """
        self.cancel: Callable[[], None] = lambda: None
        self.answered: Callable[[], None] = lambda: None
        self._above = above
        self._vanished = False
        self._handlers: list[Callable[[], bool]] = []

    @property
    def vanished(self) -> bool:
        """The process of the command was killed; it did not ask for an end of the build."""
        return self._vanished or (self._above is not None and self._above.vanished)

    @vanished.setter
    def vanished(self, value: bool) -> None:
        self._vanished = value

    def arrived(self) -> None:
        """Take an interrupt, on the event loop."""
        if self._handlers and self._handlers[-1]():
            self.answered()
        else:
            self.cancel()

    @contextmanager
    def handled_by(self, handler: Callable[[], bool]) -> Iterator[None]:
        """Ask a handler while the block runs; it says False when the command is to end."""
        self._handlers.append(handler)
        try:
            yield
        finally:
            self._handlers.remove(handler)

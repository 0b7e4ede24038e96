"""Leaving a build that goes on: at once with --detach, or when the user says so."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_client.build.question import Question
from offload_core.errors import InvalidValueError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.build.runrecord import RunRecord
    from offload_client.invocation import Invocation
    from offload_client.progress.display import Display


def check_detach(options: BuildOptions, outputs: Sequence[OutputOption]) -> None:
    """Refuse --detach with what needs the command until the end of the build.

    Raises:
        InvalidValueError: with what to do instead.
    """
    what = kept_here(options, outputs)
    if options.detach and what:
        load = any(output.load for output in outputs)
        raise InvalidValueError(
            f"--detach leaves the build before its end, so it cannot be used with {what}",
            hint="load the image later with: offload pull ID" if load else "",
        )


def kept_here(options: BuildOptions, outputs: Sequence[OutputOption]) -> str:
    """Return what this command is to do after the build, as the user wrote it."""
    found = []
    for output in outputs:
        if output.load:
            found.append("--load")
        elif output.dest:
            found.append(f"--output type={output.type}")
    found += ["--cache-to type=local" for cache in options.caches.exports if cache.type == "local"]
    if options.iidfile:
        found.append("--iidfile")
    if options.metadata_file:
        found.append("--metadata-file")
    if options.summary_file:
        found.append("--summary-file")
    if options.call is not None:
        found.append("--call")
    return " and ".join(dict.fromkeys(found))


class Departure:
    """Waits for the moment to leave one build."""

    def __init__(
        self,
        invocation: Invocation,
        options: BuildOptions,
        outputs: Sequence[OutputOption],
        record: RunRecord,
        display: Display,
    ) -> None:
        self._invocation = invocation
        self._options = options
        self._record = record
        self._display = display
        self._said = ""
        self._wanted = asyncio.Event()
        self._question = Question(
            invocation,
            record,
            self._say,
            self._wanted.set,
            forfeits=kept_here(options, outputs),
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Ask what Ctrl-C means while the block runs."""
        with self._invocation.interrupts.handled_by(self._question.ask):
            try:
                yield
            finally:
                self._question.close()

    async def wait(self) -> None:
        """Return when the user wants to leave and may; with --detach as soon as that is so."""
        if not self._options.detach:
            await self._wanted.wait()
            self._wanted.clear()
            return
        while not self._record.independent:
            needs = self._record.needs
            if needs and needs != self._said:
                self._said = needs
                self._display.notice("info", f"--detach waits: the build needs you for {needs}")
            await self._record.standing_changed()

    def refused(self) -> None:
        """Say that the build needs the client after all."""
        if not self._options.detach:
            self._say(f"the build needs you for {self._record.needs}; it goes on")

    def _say(self, text: str) -> None:
        from offload_client.progress.quiet import QuietDisplay

        if isinstance(self._display, QuietDisplay):
            self._invocation.err(text)
        else:
            self._display.notice("info", text)

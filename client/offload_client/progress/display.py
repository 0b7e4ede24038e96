"""Which display a command uses."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from offload_client.ci.system import find_system
from offload_client.progress.output import Sink
from offload_core.errors import InvalidValueError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from offload_client.progress.local import LocalStep
    from offload_client.progress.summary import Totals
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import Failure

MODES = ("auto", "none", "plain", "quiet", "rawjson", "tty")
"""Values of --progress; "none" is another name of "quiet"."""


class Display(Protocol):
    """Shows one build. Methods may be called from any thread and do not block, but `finish`."""

    def feed(self, batch: ProgressBatch) -> None:
        """Show what happened in BuildKit; batches must come in order and only once."""

    @property
    def crowded(self) -> bool:
        """Much output waits for its reader."""

    async def room(self) -> None:
        """Wait while `crowded`."""

    def local_step(self, name: str) -> LocalStep:
        """Start a step of the client itself."""

    def notice(self, level: str, text: str) -> None:
        """Show a sentence; the level is "info" or "warning"."""

    def begin_again(self, text: str) -> None:
        """Show with a sentence that the build starts once more, elsewhere.

        What is fed afterwards has other steps than what was fed before, see `attempts`.
        """

    def finish(self, failure: Failure | None = None, totals: Totals | None = None) -> None:
        """Write what waits, how the build failed or what it came to; blocks until it is written."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish if that was not done; the terminal is left as it was found."""


def parse_progress(text: str) -> str:
    """Return the mode of --progress; "none" is another name of "quiet".

    Raises:
        InvalidValueError: there is no such mode.
    """
    if text not in MODES:
        raise InvalidValueError(f'invalid progress mode "{text}": write one of {", ".join(MODES)}')
    return "quiet" if text == "none" else text


async def finish_display(
    display: Display, failure: Failure | None, totals: Totals | None = None
) -> None:
    """Wait for the reader of the progress, who may be slow, without holding up other builds."""
    from offload_client.bytepipe import in_thread

    await in_thread(lambda: display.finish(failure, totals), name="display-finish")


def make_display(
    mode: str,
    stream: IO[Any],
    environment: Mapping[str, str],
    *,
    expand_warnings: bool = False,
    sources: Mapping[str, str] | None = None,
    folds: bool = True,
    doing: str = "Building",
) -> Display:
    """Return the display for a value of --progress.

    "auto" follows OFFLOAD_PROGRESS, then BUILDKIT_PROGRESS, then what the stream is: interactive
    on a terminal that is not "dumb", plain elsewhere and in continuous integration. A "tty" from
    the environment is a wish that a pipe cannot fulfil, one from the command line is an order.

    Args:
        mode: one of `MODES`.
        stream: text or binary; stays open. May be the terminal of another process.
        environment: also of that process; see TtyDisplay and PlainDisplay for what is read.
        expand_warnings: give warnings with details at the end of the build.
        sources: in continuous integration: path of a Dockerfile in the repository by its name.
        folds: in continuous integration: the lines are for its log, so fold and annotate them.
        doing: on a terminal: what the first line says.

    Raises:
        UsageError: unknown mode, or "tty" for a stream that is not a terminal.
    """
    sink = Sink(stream)
    system = find_system(environment)
    chosen = _checked(mode, "--progress")
    if chosen == "auto":
        chosen = _automatic(sink, environment, watched=not system)
    elif chosen == "tty" and not sink.is_terminal:
        raise UsageError("--progress=tty needs a terminal, and the output is not one")
    if chosen == "tty":
        from offload_client.progress.tty import TtyDisplay

        rows = TtyDisplay(sink, environment, expand_warnings=expand_warnings, doing=doing)
        if system:
            from offload_client.ci.guard import guard_for

            rows.guard_with(guard_for(system))
        return rows
    if chosen == "plain" and system:
        from offload_client.ci.display import CiDisplay

        return CiDisplay(
            sink,
            environment,
            system,
            sources=sources or {},
            folds=folds,
            expand_warnings=expand_warnings,
        )
    if chosen == "plain":
        from offload_client.progress.plain import PlainDisplay

        return PlainDisplay(sink, environment, expand_warnings=expand_warnings)
    if chosen == "rawjson":
        from offload_client.progress.rawjson import RawJsonDisplay

        lines = RawJsonDisplay(sink)
        if system:
            from offload_client.ci.guard import guard_for, guard_json

            lines.guard_with(guard_for(system))
            lines.guard_lines_with(guard_json)
        return lines
    from offload_client.progress.quiet import QuietDisplay

    quiet = QuietDisplay(sink)
    if system:
        from offload_client.ci.guard import guard_for

        quiet.guard_with(guard_for(system))
    return quiet


def _automatic(sink: Sink, environment: Mapping[str, str], *, watched: bool) -> str:
    # Systems such as Buildkite give commands a terminal that nobody sits at.
    seen = watched and sink.is_terminal and environment.get("TERM") != "dumb"
    detected = "tty" if seen else "plain"
    for name in ("OFFLOAD_PROGRESS", "BUILDKIT_PROGRESS"):
        wish = environment.get(name, "")
        if not wish:
            continue
        wish = _checked(wish, name)
        if wish == "auto" or (wish == "tty" and not sink.is_terminal):
            return detected
        return wish
    return detected


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise UsageError(f'{source} is "{mode}"; write one of {", ".join(MODES)}')
    return "quiet" if mode == "none" else mode

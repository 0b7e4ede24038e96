"""The display in continuous integration: plain lines, folds, annotations at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.ci.foldedprinter import FoldedPrinter
from offload_client.ci.guard import guard_for
from offload_client.ci.orders import MAX_ANNOTATIONS, Annotation, Orders
from offload_client.progress.excerpt import distinct_warnings
from offload_client.progress.plain import PlainDisplay

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from offload_client.progress.output import Sink
    from offload_client.progress.printer import PlainPrinter
    from offload_proto.v1.events_pb2 import SourceRange, VertexWarning
    from offload_proto.v1.node_service_pb2 import Failure


class CiDisplay(PlainDisplay):
    """Prints what PlainDisplay prints, for the log of a system."""

    def __init__(
        self,
        sink: Sink,
        environment: Mapping[str, str],
        system: str,
        *,
        sources: Mapping[str, str],
        folds: bool = True,
        expand_warnings: bool = False,
    ) -> None:
        """Print to any stream.

        Args:
            sink: where the output goes.
            environment: as for PlainDisplay.
            system: as `find_system` says.
            sources: path from the top of the repository, by the name of a Dockerfile in messages.
            folds: fold the output of steps, and annotate.
            expand_warnings: give warnings with their details at the end.
        """
        self._orders = Orders(system)
        self._guard_lines = guard_for(system)
        self._folds = folds
        self._sources = sources
        super().__init__(sink, environment, expand_warnings=expand_warnings)

    def _make_printer(self, *, truncate_names: bool) -> PlainPrinter:
        return FoldedPrinter(
            self.view,
            self._orders,
            self._guard_lines,
            folds=self._folds,
            truncate_names=truncate_names,
        )

    def _final(self, failure: Failure | None) -> bytes:
        steps = super()._final(failure)
        if not self._folds:
            return steps
        found = annotations_of(self.view.warnings, failure, self._sources)
        return steps + b"".join(map(self._orders.annotate, found))

    def _ending(self, failure: Failure | None) -> bytes:
        ending = self._guard_lines(super()._ending(failure))
        if not ending or not self._folds:
            return ending
        title = "build failed" if failure is not None else "build done"
        return self._orders.show(title) + ending


def annotations_of(
    warnings: Iterable[VertexWarning], failure: Failure | None, sources: Mapping[str, str]
) -> list[Annotation]:
    """Return what is to be marked in the files of the repository.

    Args:
        warnings: of the build.
        failure: how it failed, if it did.
        sources: as for CiDisplay.
    """
    found = []
    if failure is not None:
        line, end_line = _lines(failure.source_ranges)
        found.append(
            Annotation(
                "error",
                failure.message or "the build failed",
                title="Build failed",
                file=sources.get(failure.source_filename, ""),
                line=line,
                end_line=end_line,
            )
        )
    for warning in distinct_warnings(warnings)[:MAX_ANNOTATIONS]:
        line, end_line = _lines(warning.ranges)
        short = warning.short.decode("utf-8", "replace")
        details = [detail.decode("utf-8", "replace") for detail in warning.detail]
        found.append(
            Annotation(
                "warning",
                "\n".join(filter(None, (short, *details, warning.url))),
                title=short.partition(":")[0],
                file=sources.get(warning.source_filename, ""),
                line=line,
                end_line=end_line,
            )
        )
    return found


def _lines(ranges: Sequence[SourceRange]) -> tuple[int, int]:
    if not ranges:
        return 0, 0
    return min(span.start_line for span in ranges), max(span.end_line for span in ranges)

"""What a build leaves for the pipeline that runs it: a summary, and a file with its ids."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from offload_client.build.outputfiles import check_file, replace_file
from offload_client.bytepipe import in_thread
from offload_client.ci.jobsummary import Outcome, summary_markdown
from offload_client.ci.system import GITHUB, find_system
from offload_client.gateway import GatewayCalls
from offload_client.progress.base import ViewDisplay
from offload_client.progress.excerpt import failure_report
from offload_client.progress.summary import summary_facts
from offload_core.errors import ConfigError, OffloadError
from offload_proto.v1.builds_service_pb2 import BuildState, GetRequest, ListRequest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.progress.display import Display
    from offload_client.progress.summary import Totals
    from offload_client.settings import Settings
    from offload_proto.v1.node_service_pb2 import Failure

SUMMARY_VARIABLE = "OFFLOAD_SUMMARY_FILE"
NO_SUMMARY = "none"
_GITHUB_VARIABLE = "GITHUB_STEP_SUMMARY"
_PREFIX = "OFFLOAD_"
"""Of the names in the result file."""
_HISTORY_SECONDS = 2.0
"""How long the gateway may take to know that a build has ended."""
_HISTORY_POLL_SECONDS = 0.1
_ENDED = (
    BuildState.BUILD_STATE_SUCCEEDED,
    BuildState.BUILD_STATE_FAILED,
    BuildState.BUILD_STATE_CANCELED,
    BuildState.BUILD_STATE_LOST,
)
_MAX_PARTS = 200
_STEP_BYTES = 1 << 20
"""Of all summaries of a step. Source: GitHub "Adding a job summary", step isolation and limits."""


class JobReport:
    """Collects what one command has built, and writes it at the end."""

    def __init__(
        self, invocation: Invocation, title: str, summary_file: str, result_file: str = ""
    ) -> None:
        """Prepare.

        Args:
            invocation: of the command.
            title: what is built, for people.
            summary_file: value of --summary-file; empty for what the environment says.
            result_file: value of --result-file.
        """
        self._invocation = invocation
        self._title = title
        self._result = invocation.path(result_file) if result_file else None
        self._summary, self._appended = _summary_path(invocation, summary_file)
        self._display: Display | None = None
        self._failure: Failure | None = None
        self._totals: Totals | None = None
        self._images: dict[str, str] = {}
        self._builds: list[str] = []
        self._values: dict[str, str] = {}

    def prepare(self) -> None:
        """Refuse files that cannot be written, and remove the result of a former build.

        Raises:
            InvalidValueError: one is a directory.
            ConfigError: one cannot be written.
        """
        if self._summary is not None and not self._appended:
            check_file(self._summary)
        if self._result is not None:
            check_file(self._result)
            try:
                if self._result.is_file():
                    self._result.unlink()
            except OSError as error:
                raise ConfigError(f"cannot remove {self._result}: {error.strerror}") from error

    def watch(self, display: Display) -> None:
        """Take steps and warnings from a display."""
        self._display = display

    def ended(self, failure: Failure | None, totals: Totals | None) -> None:
        """Take how the build has ended."""
        self._failure, self._totals = failure, totals

    def built(
        self, build_id: str, name: str = "", metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Take a build.

        Args:
            build_id: in the history.
            name: of what it has built, where there are several.
            metadata: as --metadata-file has it; None for a build that has not worked.
        """
        if build_id and build_id not in self._builds:
            self._builds.append(build_id)
        self._values["BUILD_ID"] = build_id
        for variable, key in (
            ("BUILD_REF", "buildx.build.ref"),
            ("IMAGE_DIGEST", "containerimage.digest"),
            ("IMAGE_NAME", "image.name"),
        ):
            if metadata and metadata.get(key):
                self._values[variable] = str(metadata[key])
        if metadata and (digest := metadata.get("containerimage.digest")):
            self._images[name] = str(digest)

    def image_id(self, image_id: str) -> None:
        """Take what --iidfile would have."""
        if image_id:
            self._values["IMAGE_ID"] = image_id

    async def write(
        self,
        settings: Settings | None,
        connections: Connections,
        error: OffloadError | None,
    ) -> None:
        """Write both files; a summary that nobody has named never fails a build.

        Args:
            settings: which gateway knows the builds; None where none is known.
            connections: of the process.
            error: how the command ends; None when it worked.

        Raises:
            ConfigError: a file cannot be written, and nothing else went wrong.
        """
        try:
            self._write_result()
            if self._summary is not None:
                saved = await self._saved_seconds(settings, connections) if error is None else 0.0
                outcome = self._outcome(error, saved)
                await in_thread(lambda: self._write_summary(outcome), name="summary")
        except ConfigError as problem:
            if error is None and not self._appended:
                raise
            self._invocation.err(f"WARNING: {problem.message}")

    def _write_result(self) -> None:
        if self._result is None or not self._builds:
            return
        lines = [
            f"{_PREFIX}{name}={' '.join(value.split())}\n" for name, value in self._values.items()
        ]
        replace_file(self._result, "".join(lines))

    def _write_summary(self, outcome: Outcome) -> None:
        path = self._summary
        if path is None:
            return
        text = summary_markdown(outcome)
        if not self._appended:
            replace_file(path, text)
            return
        try:
            with path.open("ab") as file:
                if file.tell() + len(text.encode()) > _STEP_BYTES:
                    raise ConfigError(
                        "the job summary has no room for this build, whose summary is left out"
                    )
                file.write(text.encode("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def _outcome(self, error: OffloadError | None, saved_seconds: float) -> Outcome:
        explanation = b""
        view = None
        if isinstance(self._display, ViewDisplay):
            view = self._display.view
            explanation = self._display.excerpts() if error is not None else b""
        if self._failure is not None:
            explanation += failure_report(self._failure)
        elif error is not None:
            explanation += f"ERROR: {error.message}\n{error.hint}".encode("utf-8", "replace")
        facts = {}
        if view is not None and self._totals is not None:
            facts = summary_facts(view, self._totals, time.monotonic())
        return Outcome(
            self._title,
            error=(error.message or "failed") if error is not None else "",
            explanation=explanation.decode("utf-8", "replace"),
            images=self._images,
            build_ids=self._builds,
            facts=facts,
            totals=self._totals,
            saved_seconds=saved_seconds,
            steps=view.shown if view is not None else (),
            warnings=view.warnings if view is not None else (),
        )

    async def _saved_seconds(self, settings: Settings | None, connections: Connections) -> float:
        """Return how long the cached steps once took; 0 where the gateway does not say."""
        if settings is None or not self._builds:
            return 0.0
        try:
            async with asyncio.timeout(2 * _HISTORY_SECONDS):
                calls = await GatewayCalls.open(self._invocation, settings, connections)
                times = [await _saved_milliseconds(calls, build_id) for build_id in self._builds]
        except (OffloadError, TimeoutError):
            return 0.0
        return sum(times) / 1000


async def _saved_milliseconds(calls: GatewayCalls, build_id: str) -> int:
    deadline = time.monotonic() + _HISTORY_SECONDS
    while True:
        build = (await calls.call(calls.builds.Get, GetRequest(build_id=build_id))).build
        if build.state in _ENDED or time.monotonic() > deadline:
            break
        await asyncio.sleep(_HISTORY_POLL_SECONDS)
    saved: int = build.stats.saved_milliseconds
    if build.group_id:
        request = ListRequest(project_id=build.project_id, page_size=_MAX_PARTS)
        found = (await calls.call(calls.builds.List, request)).builds
        parts = [part for part in found if part.group_id == build.group_id]
        saved = sum(part.stats.saved_milliseconds for part in parts) or saved
    return saved


def _summary_path(invocation: Invocation, told: str) -> tuple[Path | None, bool]:
    """Return where the summary goes, and whether it is added to what stands there."""
    environment = invocation.environment
    name = told or environment.get(SUMMARY_VARIABLE, "")
    if name:
        return (None if name == NO_SUMMARY else invocation.path(name)), False
    path = environment.get(_GITHUB_VARIABLE, "")
    if path and find_system(environment) == GITHUB:
        return invocation.path(path), True
    return None, False

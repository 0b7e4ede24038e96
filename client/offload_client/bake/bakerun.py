"""Building the targets of a plan: in parallel, with one display, dependencies first."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload_client.bake.answers import EMPTY_CONTEXT, CallAnswers
from offload_client.bake.handover import BuiltImage
from offload_client.bake.sharedscan import SharedContexts
from offload_client.bake.targetdisplay import TargetDisplay
from offload_client.build.buildrun import BuildRun
from offload_client.build.contextfiles import open_context
from offload_client.build.options import OutputOption
from offload_client.build.outputfiles import check_file, replace_file
from offload_client.build.privateinputs import PrivateInputs
from offload_client.build.runner import (
    INLINE_MESSAGE,
    NO_OUTPUT,
    error_of,
    groups_of,
)
from offload_client.build.spec import effective_outputs
from offload_client.bytepipe import in_thread
from offload_client.ci.jobreport import JobReport
from offload_client.ci.sourcenames import source_names
from offload_client.eventlog import show_events
from offload_client.interrupts import Interrupts
from offload_client.progress.display import finish_display, make_display
from offload_client.progress.summary import Totals
from offload_client.settings import resolve_settings
from offload_core.contextnames import layout_source_name
from offload_core.errors import (
    BuildCanceledError,
    InvalidValueError,
    OffloadError,
    find_offload_error,
)
from offload_proto.v1.node_service_pb2 import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload_client.bake.plan import BakePlan
    from offload_client.bake.request import BakeRequest
    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.options import BuildOptions
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.legs.legsbuild import LegsBuild
    from offload_client.progress.display import Display
    from offload_client.settings import Settings
    from offload_proto.v1.node_service_pb2 import Result

IMAGE_KEYS = "containerimage."
"""What the exporter says of an image begins so."""


class BakeRun:
    """One `offload-build bake`; used once."""

    def __init__(
        self,
        invocation: Invocation,
        request: BakeRequest,
        plan: BakePlan,
        options: Mapping[str, BuildOptions],
        connections: Connections,
    ) -> None:
        """Prepare.

        Args:
            invocation: of the command.
            request: what it asks for.
            plan: what is built.
            options: how each target is built.
            connections: of the process.
        """
        self._invocation = invocation
        self._request = request
        self._plan = plan
        self._options = options
        self._connections = connections
        directory = invocation.environment.get("TMPDIR")
        self._answers = CallAnswers(request.call, plan, options)
        self._answers.check()
        self._images = {
            name: BuiltImage(name, _users(plan, name), directory)
            for name in plan.needed()
            if options[name].call is None
        }
        self.contexts = SharedContexts()
        self._metadata: dict[str, Any] = {}
        self._messages: dict[str, str] = {}
        self._totals: Totals | None = None
        self._failure: Failure | None = None
        self._report = JobReport(invocation, " ".join(request.targets), request.summary_file)
        self._display: Display
        self._settings: Settings
        self._identity: StoredIdentity

    async def run(self) -> None:
        """Build all targets; the first that fails ends the others.

        Cancelling this cancels all builds.

        Raises:
            OffloadError: with docker's or our documented exit code.
        """
        self._check_outputs()
        self._settings = resolve_settings(
            self._invocation, gateway=self._request.gateway, project=self._request.project
        )
        self._report.prepare()
        try:
            await self._run()
        except OffloadError as error:
            await self._report.write(self._settings, self._connections, error)
            raise
        await self._report.write(self._settings, self._connections, None)

    async def _run(self) -> None:
        invocation, request = self._invocation, self._request
        if request.metadata_file:
            check_file(invocation.path(request.metadata_file))
        for remark, names in self._remarks().items():
            about = "" if len(names) == len(self._options) else f"target {', '.join(names)}: "
            invocation.err(f"WARNING: {about}{remark}")
        debug = request.debug or bool(invocation.environment.get("OFFLOAD_DEBUG"))
        with make_display(
            request.progress,
            invocation.stderr,
            invocation.environment,
            expand_warnings=debug,
            sources=source_names(invocation, self._options.values()),
        ) as display:
            self._display = display
            self._report.watch(display)
            show_events(display.notice, everything=debug)
            try:
                self._identity = await self._connections.identity(
                    invocation, self._settings.gateway
                )
                await self._build_all()
            finally:
                self._report.ended(self._failure, self._totals)
                await finish_display(display, self._failure, self._totals)
        await in_thread(self._conclude, name="last-words")

    def _remarks(self) -> dict[str, list[str]]:
        """Return what to warn of before building, with the targets that it is about."""
        found: dict[str, list[str]] = {}
        for name, options in self._options.items():
            for remark in options.remarks:
                found.setdefault(remark, []).append(name)
        return found

    def _check_outputs(self) -> None:
        to_stdout = [
            name
            for name, options in self._options.items()
            if any(output.dest == "-" for output in effective_outputs(options))
        ]
        if len(to_stdout) > 1:
            raise InvalidValueError(
                f"only one output can go to standard output, not those of {', '.join(to_stdout)}"
            )

    async def _build_all(self) -> None:
        async with AsyncExitStack() as stack:
            for image in self._images.values():
                stack.push_async_callback(image.close)
            try:
                async with asyncio.TaskGroup() as tasks:
                    building = [
                        tasks.create_task(self._build(name), name=f"bake.{name}")
                        for name in self._options
                    ]
            except BaseExceptionGroup as group:
                raise (find_offload_error(group) or group) from None
        self._totals = sum((done.result() for done in building), Totals())

    async def _build(self, name: str) -> Totals:
        needs = self._plan.needs(name)
        try:
            given = {
                context: await self._images[other].wait() if other in self._images else ""
                for context, other in needs.items()
            }
            async with open_context(self._invocation, self._options[name]) as files:
                return await self._build_target(name, self._completed(name, files, given))
        except OffloadError as error:
            if not error.shown and not error.message.startswith("target "):
                error.args = (f"target {name}: {error.message}",)
            raise
        finally:
            for other in needs.values():
                if other in self._images:
                    self._images[other].leave()

    def _completed(self, name: str, files: ContextFiles, given: Mapping[str, str]) -> ContextFiles:
        """Return the files of a target with the images of others, in their shared form."""
        sources = self.contexts.share(files.sources)
        values = dict(files.named)
        display = self._display_of(name)
        for context, digest in given.items():
            if not digest:
                values[context] = EMPTY_CONTEXT
                continue
            image = self._images[self._plan.needs(name)[context]]
            sources[layout_source_name(context)] = image.as_source(display)
            values[context] = f"oci-layout://{context}@{digest}"
        return replace(
            files,
            sources=sources,
            named=values,
            # Targets of a matrix have one Dockerfile, and each its own cache.
            definition=f"{files.definition}\0{name}"
            if len(self._options) > 1
            else files.definition,
        )

    async def _build_target(self, name: str, files: ContextFiles) -> Totals:
        options = self._options[name]
        display = self._display_of(name)
        outputs, implied = self._outputs(name)
        image = self._images.get(name)
        private = await in_thread(
            lambda: PrivateInputs(self._invocation, options), name="private-inputs"
        )
        parts = (
            # Ctrl-C ends all of them: several cannot ask at one terminal.
            replace(self._invocation, interrupts=Interrupts(self._invocation.interrupts)),
            options,
            outputs,
            files,
            display,
            self._connections,
            self._settings,
            private,
        )
        hold = image.hold if image is not None else None
        build: BuildRun | LegsBuild = BuildRun(*parts, hold=hold)
        build.results.prepare()
        for warning in files.warnings:
            display.notice("warning", warning)
        try:
            groups = await groups_of(options, self._settings, self._connections, self._identity)
            if len(groups) > 1:
                from offload_client.legs.legsbuild import LegsBuild

                build = LegsBuild(*parts, groups=groups, results=build.results, hold=hold)
            assigned, result = await build.run(self._identity)
        finally:
            private.secrets.forget()
        if result is None:
            raise BuildCanceledError("canceled")
        if result.HasField("failure"):
            raise self._failed(name, result)
        metadata = build.results.metadata(result, assigned.build_id, assigned.node_id)
        if implied:
            # Only another target wanted the image.
            metadata = {
                key: value for key, value in metadata.items() if not key.startswith(IMAGE_KEYS)
            }
        self._metadata[name] = metadata
        self._report.built(assigned.build_id, name, metadata)
        if options.call is not None:
            self._answers.add(name, options.call, result.success.call_result)
        elif message := result.success.exporter_response.get(INLINE_MESSAGE):
            self._messages[name] = message
        return build.results.totals(result)

    def _outputs(self, name: str) -> tuple[Sequence[OutputOption], bool]:
        """Return the outputs of a target, and whether it has an image only for other targets."""
        outputs = effective_outputs(self._options[name])
        if name not in self._images or any(output.type == "image" for output in outputs):
            return outputs, False
        kept = [output for output in outputs if output.type != "cacheonly"]
        return [*kept, OutputOption("image")], not any(item.type == "registry" for item in kept)

    def _failed(self, name: str, result: Result) -> OffloadError:
        failure = Failure()
        failure.CopyFrom(result.failure)
        failure.message = f"target {name}: {failure.message}"
        if self._failure is None:
            display = self._display_of(name)
            if isinstance(display, TargetDisplay) and failure.vertex:
                failure.vertex = display.digest(failure.vertex)
            self._failure = failure
        return error_of(failure)

    def _display_of(self, name: str) -> Display:
        if len(self._options) == 1:
            return self._display
        display: Any = TargetDisplay(self._display, name)
        return display  # type: ignore[no-any-return]

    def _conclude(self) -> None:
        if self._request.metadata_file:
            path = self._invocation.path(self._request.metadata_file)
            replace_file(path, json.dumps(self._metadata, indent=2, sort_keys=True))
        silent = [
            name
            for name, options in self._options.items()
            if name not in self._images and options.call is None and not effective_outputs(options)
        ]
        if silent and self._request.progress not in ("quiet", "none"):
            said = NO_OUTPUT.partition(".")
            self._invocation.err(f"WARNING: {said[0]} for {', '.join(silent)} target(s).{said[2]}")
        text, error = self._answers.output()
        if text:
            asked = "format=json" in self._request.call
            show = self._invocation.out if asked else self._invocation.out_foreign
            show(text.removesuffix("\n"))
        for name in sorted(self._messages):
            self._invocation.out_foreign(f"\n# {name}\n{self._messages[name]}")
        if error is not None:
            raise error


def _users(plan: BakePlan, name: str) -> int:
    return sum(list(plan.needs(other).values()).count(name) for other in plan.targets)

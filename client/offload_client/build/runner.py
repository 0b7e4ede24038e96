"""`offload-build`: from the command line to the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.build.buildrun import BuildRun
from offload_client.build.contextfiles import ContextFiles, open_context
from offload_client.build.departure import check_detach
from offload_client.build.privateinputs import PrivateInputs
from offload_client.build.spec import effective_outputs
from offload_client.bytepipe import in_thread
from offload_client.ci.jobreport import JobReport
from offload_client.ci.sourcenames import source_names
from offload_client.eventlog import show_events
from offload_client.progress.display import finish_display, make_display
from offload_client.settings import resolve_settings
from offload_core.errors import (
    BuildCanceledError,
    BuildFailedError,
    ContextChangedError,
    ContextError,
    NodeLostError,
    OffloadError,
    QuotaExceededError,
    RegistryAuthError,
    StepMemoryError,
    UsageError,
)
from offload_core.reference import familiar_reference
from offload_proto.v1.node_service_pb2 import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.build.networkreport import NetworkReport
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.legs.legsbuild import LegsBuild
    from offload_client.settings import Settings
    from offload_proto.v1.node_service_pb2 import Result

NO_OUTPUT = (
    "No output specified. Build result will only remain in the build cache. "
    "To push result image into registry use --push or to load image into docker use --load"
)
INLINE_MESSAGE = "frontend.result.inlinemessage"
"""What a frontend wants to be printed at the end (docker/buildx commands/build.go)."""

_FAILURES: dict[int, type[OffloadError]] = {
    Failure.KIND_BUILD: BuildFailedError,
    Failure.KIND_CANCELED: BuildCanceledError,
    Failure.KIND_CONTEXT: ContextError,
    Failure.KIND_NODE: NodeLostError,
    Failure.KIND_REGISTRY_AUTH: RegistryAuthError,
    Failure.KIND_CONTEXT_CHANGED: ContextChangedError,
    Failure.KIND_LIMIT: QuotaExceededError,
    Failure.KIND_OUT_OF_MEMORY: StepMemoryError,
}


async def run_build(
    invocation: Invocation, options: BuildOptions, connections: Connections
) -> None:
    """Build, and deliver what was asked for.

    Cancelling this cancels the build at the node.

    Raises:
        OffloadError: with docker's or our documented exit code.
        BrokenPipeError: nobody reads the results any more.
    """
    if options.network_policy:
        from offload_client.build.networkpolicy import with_network_policy

        options = await with_network_policy(invocation, options)
    async with open_context(invocation, options) as files:
        settings = resolve_settings(
            invocation, gateway=options.gateway, project=options.project, directory=files.root
        )
        tag = next(iter(options.tags), "")
        title = familiar_reference(tag) if tag else files.root.resolve().name
        report = JobReport(invocation, title, options.summary_file, options.result_file)
        report.prepare()
        network = None
        if options.network_report or options.network_report_file:
            network = _network_report(invocation, options)
        try:
            await _build(invocation, options, connections, files, settings, report, network)
        except OffloadError as error:
            await report.write(settings, connections, error)
            raise
        await report.write(settings, connections, None)


async def _build(
    invocation: Invocation,
    options: BuildOptions,
    connections: Connections,
    files: ContextFiles,
    settings: Settings,
    report: JobReport,
    network: NetworkReport | None,
) -> None:
    outputs = effective_outputs(options)
    check_detach(options, outputs)
    for remark in options.remarks:
        # As docker does: whatever the progress looks like.
        invocation.err(f"WARNING: {remark}")
    result: Result | None = None
    debug = options.debug or bool(invocation.environment.get("OFFLOAD_DEBUG"))
    with make_display(
        options.progress,
        invocation.stderr,
        invocation.environment,
        expand_warnings=debug,
        sources=source_names(invocation, [options]),
    ) as display:
        report.watch(display)
        show_events(display.notice, everything=debug)
        private = await in_thread(lambda: PrivateInputs(invocation, options), name="private-inputs")
        parts = (invocation, options, outputs, files, display, connections, settings, private)
        build: BuildRun | LegsBuild = BuildRun(*parts)
        build.results.prepare()
        for warning in files.warnings:
            display.notice("warning", warning)
        try:
            identity = await connections.identity(invocation, settings.gateway)
            groups = await groups_of(options, settings, connections, identity)
            if len(groups) > 1:
                from offload_client.legs.legsbuild import LegsBuild

                build = LegsBuild(*parts, groups=groups, results=build.results)
            assigned, result = await build.run(identity)
        finally:
            private.secrets.forget()
            # Whatever went wrong is told by the caller, below the steps.
            if result is None:
                await finish_display(display, None)
        report.built(assigned.build_id)
        if result is None:
            _left(invocation, options, assigned.build_id)
            return
        failure = result.failure if result.HasField("failure") else None
        totals = build.results.totals(result)
        report.ended(failure, totals)
        await finish_display(display, failure, totals)
    if network is not None:
        await network.give(assigned.build_id, settings, connections)
    if failure is not None:
        raise error_of(failure)
    metadata = build.results.metadata(result, assigned.build_id, assigned.node_id)
    report.built(assigned.build_id, metadata=metadata)
    report.image_id(build.results.image_id(result))
    build.results.write_files(result, assigned.build_id, assigned.node_id)
    done = result
    if options.call is not None:
        await in_thread(lambda: _answer(invocation, options, done), name="answer")
        return
    if options.detach:
        # It has ended before it could be left.
        invocation.out(assigned.build_id)
        return
    await in_thread(
        lambda: _last_words(invocation, options, outputs, build.results.image_id(done)),
        name="last-words",
    )
    if message := result.success.exporter_response.get(INLINE_MESSAGE):
        await in_thread(lambda: invocation.out_foreign(f"\n{message}"), name="inline-message")


def _network_report(invocation: Invocation, options: BuildOptions) -> NetworkReport:
    """Return what gives the report of the network at the end.

    Raises:
        UsageError: nobody waits for the end.
        OffloadError: its file cannot be written.
    """
    from offload_client.build.networkreport import NetworkReport

    if options.detach:
        raise UsageError(
            "--network-report needs the end of the build, for which --detach does not wait",
            hint="ask afterwards: offload policy learn BUILD",
        )
    network = NetworkReport(
        invocation, shown=options.network_report, file=options.network_report_file
    )
    network.prepare()
    return network


async def groups_of(
    options: BuildOptions,
    settings: Settings,
    connections: Connections,
    identity: StoredIdentity,
) -> list[tuple[str, ...]]:
    """Return the platforms of a build, those together that one node is to build.

    Raises:
        OffloadError: as `platform_groups`.
    """
    if len(options.platforms) < 2 or options.call is not None:
        return [tuple(options.platforms)]
    from offload_client.legs.grouping import platform_groups

    return await platform_groups(options, settings, connections, identity)


def _answer(invocation: Invocation, options: BuildOptions, result: Result) -> None:
    """Print what a call has found.

    Raises:
        BuildFailedError: it has found something, or the Dockerfile is wrong.
    """
    if options.call is None:
        return
    from offload_client.build.callresult import call_output, dockerfile_title

    title = dockerfile_title(options.path, options.file)
    text, error = call_output(options.call, result.success.call_result, title)
    if text:
        show = invocation.out if options.call.machine_readable else invocation.out_foreign
        show(text.removesuffix("\n"))
    if error is not None:
        raise error


def _left(invocation: Invocation, options: BuildOptions, build_id: str) -> None:
    hint = f"the build goes on; follow it with: offload attach {build_id}"
    if options.detach:
        invocation.err(hint)
        invocation.out(build_id)
        return
    # The command is, not the build: what it was to do is not done.
    left = BuildCanceledError("left", hint=hint)
    left.shown = True
    raise left


def _last_words(
    invocation: Invocation,
    options: BuildOptions,
    outputs: Sequence[OutputOption],
    image_id: str,
) -> None:
    if not outputs and options.progress != "quiet":
        invocation.err(f"WARNING: {NO_OUTPUT}")
    if options.quiet:
        invocation.out(image_id)


def error_of(failure: Failure) -> OffloadError:
    """Return the error for how a build failed; the display has shown it."""
    cls = _FAILURES.get(failure.kind, BuildFailedError)
    error = cls(failure.message)
    error.shown = True
    return error

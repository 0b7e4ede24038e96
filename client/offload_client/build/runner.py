"""`offload-build`: from the command line to the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.build.buildrun import BuildRun
from offload_client.build.contextfiles import ContextFiles, open_context
from offload_client.build.spec import effective_outputs
from offload_client.bytepipe import in_thread
from offload_client.eventlog import show_events
from offload_client.progress.display import make_display
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
)
from offload_proto.v1.node_service_pb2 import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.progress.display import Display
    from offload_proto.v1.node_service_pb2 import Result

NO_OUTPUT = (
    "No output specified. Build result will only remain in the build cache. "
    "To push result image into registry use --push or to load image into docker use --load"
)

_FAILURES: dict[int, type[OffloadError]] = {
    Failure.KIND_BUILD: BuildFailedError,
    Failure.KIND_CANCELED: BuildCanceledError,
    Failure.KIND_CONTEXT: ContextError,
    Failure.KIND_NODE: NodeLostError,
    Failure.KIND_REGISTRY_AUTH: RegistryAuthError,
    Failure.KIND_CONTEXT_CHANGED: ContextChangedError,
    Failure.KIND_LIMIT: QuotaExceededError,
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
    async with open_context(invocation, options) as files:
        await _build(invocation, options, connections, files)


async def _build(
    invocation: Invocation,
    options: BuildOptions,
    connections: Connections,
    files: ContextFiles,
) -> None:
    settings = resolve_settings(
        invocation, gateway=options.gateway, project=options.project, directory=files.root
    )
    outputs = effective_outputs(options)
    result: Result | None = None
    with make_display(options.progress, invocation.stderr, invocation.environment) as display:
        show_events(display.notice, everything=bool(invocation.environment.get("OFFLOAD_DEBUG")))
        build = BuildRun(invocation, options, outputs, files, display, connections, settings)
        build.results.prepare()
        for warning in files.warnings:
            display.notice("warning", warning)
        try:
            identity = await connections.identity(invocation, settings.gateway)
            assigned, result = await build.run(identity)
        finally:
            # Whatever went wrong is told by the caller, below the steps.
            if result is None:
                await _finish(display, None)
        failure = result.failure if result.HasField("failure") else None
        await _finish(display, failure)
    if failure is not None:
        raise _error_of(failure)
    build.results.write_files(result, assigned.build_id, assigned.node_id)
    done = result
    await in_thread(
        lambda: _last_words(invocation, options, outputs, build.results.image_id(done)),
        name="last-words",
    )


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


async def _finish(display: Display, failure: Failure | None) -> None:
    """Wait for the reader of the progress, who may be slow, without holding up other builds."""
    await in_thread(lambda: display.finish(failure), name="display-finish")


def _error_of(failure: Failure) -> OffloadError:
    cls = _FAILURES.get(failure.kind, BuildFailedError)
    error = cls(failure.message)
    error.shown = True
    return error

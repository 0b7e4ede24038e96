"""Where a build's files are: which form of build context a command line means."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_client.build.contextforms import STANDARD_INPUT, ContextFiles, ContextFinder
from offload_client.build.remotecontext import is_remote, refuse_windows_path
from offload_client.build.standardinput import StandardInput, StopReading
from offload_client.bytepipe import in_thread
from offload_client.context.statindex import index_path
from offload_core.aio import finish
from offload_core.errors import ContextError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_client.build.options import BuildOptions
    from offload_client.invocation import Invocation

__all__ = ["ContextFiles", "find_context", "open_context"]

_STOP_SECONDS = 2.0


@asynccontextmanager
async def open_context(
    invocation: Invocation, options: BuildOptions
) -> AsyncIterator[ContextFiles]:
    """Hold the files of a build; reads standard input where it is the context or the Dockerfile.

    Raises:
        ContextError: as `find_context`.
        InvalidValueError: as `find_context`.
    """
    stop = StopReading()
    # A daemon thread: a file system that hangs must not hold up the end after Ctrl-C.
    finding = in_thread(lambda: find_context(invocation, options, stop), name="find-context")
    try:
        await asyncio.wait((finding,))
        yield finding.result()
    finally:
        stop.stop()
        # The descriptor of standard input belongs to the command, which may end after this.
        await finish(asyncio.wait((finding,), timeout=_STOP_SECONDS), _STOP_SECONDS + 1)
        if finding.done():
            _release(finding, stop)
        else:
            finding.add_done_callback(lambda done: _release(done, stop))


def _release(found: asyncio.Future[ContextFiles], stop: StopReading) -> None:
    stop.close()
    if not found.cancelled() and found.exception() is None:
        found.result().close()


def find_context(
    invocation: Invocation, options: BuildOptions, stop: StopReading | None = None
) -> ContextFiles:
    """Locate and read what every build needs; for a worker thread.

    Args:
        invocation: where the command was started, and its standard input.
        options: of the build.
        stop: makes waiting for standard input end.

    Raises:
        ContextError: the context, the Dockerfile or a named context cannot be read.
        InvalidValueError: a combination that docker refuses, or a form that is not supported.
        ReadingStoppedError: see `StopReading`.
    """
    refuse_windows_path(invocation, options.path, "the build context")
    refuse_windows_path(invocation, options.file, "the Dockerfile")
    standard_input = StandardInput(invocation.stdin, stop)
    finder = ContextFinder(invocation, options, standard_input, index_path(invocation))
    root = invocation.path(options.path)
    files = _find_form(finder, root, options.path)
    if not options.caches.imports:
        return files
    from offload_client.build.localcaches import find_local_caches

    caches = find_local_caches(invocation, options.caches.imports, index_path(invocation))
    return replace(
        files,
        sources={**files.sources, **caches.sources},
        cache_imports=caches.imports,
        warnings=caches.warnings,
    )


def _find_form(finder: ContextFinder, root: Path, path: str) -> ContextFiles:
    if path == STANDARD_INPUT:
        return finder.on_standard_input()
    if path and _is_directory(root, path):
        return finder.in_directory(root)
    if is_remote(path):
        return finder.remote()
    problem = "is not a directory" if path and root.exists() else "not found"
    raise ContextError(f'unable to prepare context: path "{path}" {problem}')


def _is_directory(root: Path, given: str) -> bool:
    try:
        return root.is_dir()
    except OSError as error:
        raise ContextError(
            f'unable to prepare context: path "{given}": {error.strerror}'
        ) from error

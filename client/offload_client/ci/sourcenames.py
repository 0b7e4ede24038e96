"""Where Dockerfiles lie in the repository, for annotations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from offload_client.build.remotecontext import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from offload_client.build.options import BuildOptions
    from offload_client.invocation import Invocation

TOP_VARIABLE = "GITHUB_WORKSPACE"


def source_names(invocation: Invocation, builds: Iterable[BuildOptions]) -> dict[str, str]:
    """Return the path of each Dockerfile from the top of the repository, by its name in messages.

    Messages know a Dockerfile by the last part of its path. A name that two builds have for two
    files is left out; so is what lies outside of the repository.
    """
    top = invocation.path(invocation.environment.get(TOP_VARIABLE) or ".").resolve()
    found: dict[str, set[str]] = {}
    for options in builds:
        if options.file == "-" or options.path == "-" or options.dockerfile_inline is not None:
            continue
        if is_remote(options.path) and not invocation.path(options.path).is_dir():
            continue
        path = invocation.path(options.file or os.path.join(options.path, "Dockerfile"))  # noqa: PTH118 - not yet a path
        found.setdefault(path.name, set()).add(_below(path, top))
    return {
        name: paths.pop() for name, paths in found.items() if len(paths) == 1 and "" not in paths
    }


def _below(path: Path, top: Path) -> str:
    real = path.parent.resolve() / path.name
    return str(real.relative_to(top)) if real.is_relative_to(top) else ""

"""Where a build's files are: the context directory, its Dockerfile and its ignore file."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.build.options import check_text
from offload_client.build.vcs import build_definition
from offload_core.errors import ContextError, InvalidValueError
from offload_core.filemode import go_file_mode
from offload_proto.v1.node_service_pb2 import InlineFile

if TYPE_CHECKING:
    from pathlib import Path

    from offload_client.build.options import BuildOptions
    from offload_client.invocation import Invocation

MAX_INLINE_BYTES = 4 << 20
IGNORE_FILE = ".dockerignore"
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|git@|github\.com/")


@dataclass(frozen=True)
class ContextFiles:
    """The local sources of one build."""

    root: Path
    """Directory of the build context."""
    dockerfile_name: str
    """Name of the Dockerfile below its own directory."""
    inline: list[InlineFile]
    """Dockerfile and ignore files with their content."""
    definition: str = ""
    """What tells this build apart from others of its project; see `build_definition`."""


def find_context(invocation: Invocation, options: BuildOptions) -> ContextFiles:
    """Locate and read what every build needs.

    Raises:
        ContextError: the directory or the Dockerfile cannot be read.
        InvalidValueError: a form of PATH that is not supported.
    """
    if options.path == "-":
        raise InvalidValueError(
            "a build context on standard input is not supported yet; give a directory"
        )
    if _REMOTE.match(options.path) and not invocation.path(options.path).exists():
        raise InvalidValueError(
            f'"{options.path}" is a remote build context, which is not supported yet; '
            "clone it and give the directory"
        )
    root = invocation.path(options.path)
    if not options.path or not _is_directory(root, options.path):
        problem = "is not a directory" if options.path and root.exists() else "not found"
        raise ContextError(f'unable to prepare context: path "{options.path}" {problem}')
    try:
        dockerfile = _dockerfile(invocation, root, options.file)
        files = [_inline(dockerfile, "dockerfile")]
        beside = dockerfile.with_name(dockerfile.name + IGNORE_FILE)
        if beside.is_file():
            files.append(_inline(beside, "dockerfile"))
        if (root / IGNORE_FILE).is_file():
            files.append(_inline(root / IGNORE_FILE, "context"))
    except OSError as error:
        raise ContextError(
            f"unable to prepare context: cannot read {error.filename}: {error.strerror}"
        ) from error
    return ContextFiles(root, dockerfile.name, files, build_definition(root, dockerfile))


def index_path(invocation: Invocation) -> Path | None:
    """Return where the digests of former scans are kept; None to keep none.

    A pipeline with OFFLOAD_TOKEN starts from a fresh checkout on a machine that is thrown away, so
    nothing is written there, unless XDG_CACHE_HOME names a place that lives on.
    """
    environment = invocation.environment
    if environment.get("OFFLOAD_TOKEN") and not environment.get("XDG_CACHE_HOME"):
        return None
    return invocation.cache_dir() / "statindex.db"


def _is_directory(root: Path, given: str) -> bool:
    try:
        return root.is_dir()
    except OSError as error:
        raise ContextError(
            f'unable to prepare context: path "{given}": {error.strerror}'
        ) from error


def _dockerfile(invocation: Invocation, root: Path, given: str) -> Path:
    if given == "-":
        raise InvalidValueError("a Dockerfile on standard input is not supported yet; give a file")
    if given:
        path = invocation.path(given)
        if not path.exists() and (root / given).exists():
            # docker looks below the context as well.
            path = root / given
    else:
        path = root / "Dockerfile"
    if path.name == "Dockerfile" and not path.exists() and path.with_name("dockerfile").exists():
        path = path.with_name("dockerfile")
    check_text(f"the name of {path.parent}/{path.name!r}", path.name)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ContextError(
            f"failed to read dockerfile: open {path.name}: {(error.strerror or '').lower()} "
            f"(looked for {path})",
            hint="give its path with -f",
        ) from error
    if not stat.S_ISREG(mode):
        raise ContextError(f"failed to read dockerfile: {path} is not a regular file")
    return path


def _inline(path: Path, local_name: str) -> InlineFile:
    try:
        # The open file is measured and read, so that both belong to the same content.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_INLINE_BYTES:
                raise ContextError(
                    f"{path} has {status.st_size} bytes; at most {MAX_INLINE_BYTES} are read"
                )
            data = file.read(MAX_INLINE_BYTES + 1)
    except OSError as error:
        raise ContextError(f"cannot read {path}: {error.strerror}") from error
    mode = 0o755 if status.st_mode & 0o111 else 0o644
    return InlineFile(
        local_name=local_name,
        path=path.name,
        data=data,
        mode=go_file_mode(stat.S_IFREG | mode),
    )

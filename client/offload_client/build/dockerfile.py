"""Finds and reads the Dockerfile and the ignore files that travel with the start of a build."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from offload_client.build.options import check_text
from offload_core.contextnames import DOCKERFILE
from offload_core.errors import ContextError
from offload_core.filemode import go_file_mode
from offload_proto.v1.node_service_pb2 import InlineFile

if TYPE_CHECKING:
    from pathlib import Path

    from offload_client.invocation import Invocation

MAX_INLINE_BYTES = 4 << 20
IGNORE_FILE = ".dockerignore"
NAME = "Dockerfile"
"""Of a Dockerfile that is nowhere named."""


def locate_dockerfile(invocation: Invocation, root: Path, given: str) -> Path:
    """Return the path of a directory's Dockerfile.

    Args:
        invocation: for relative paths.
        root: directory of the build context.
        given: what -f says; empty for nothing.

    Raises:
        ContextError: there is none.
        InvalidValueError: its name is not UTF-8.
    """
    if given:
        path = invocation.path(given)
        if not path.exists() and (root / given).exists():
            # docker looks below the context as well.
            path = root / given
    else:
        path = root / NAME
    if path.name == NAME and not path.exists() and path.with_name(NAME.lower()).exists():
        path = path.with_name(NAME.lower())
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


def inline_file(path: Path, local_name: str) -> InlineFile:
    """Read a file of a local source that travels with the start of the build.

    Raises:
        ContextError: it cannot be read, or is larger than 4 MiB.
    """
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


def inline_dockerfile(data: bytes, name: str = NAME) -> InlineFile:
    """Return a Dockerfile that is no file of this machine."""
    mode = go_file_mode(stat.S_IFREG | 0o644)
    return InlineFile(local_name=DOCKERFILE, path=name, data=data, mode=mode)


def ignore_file(root: Path, local_name: str) -> list[InlineFile]:
    """Return the ignore file of a directory, if it has one.

    Raises:
        ContextError: it cannot be read, or is larger than 4 MiB.
    """
    path = root / IGNORE_FILE
    return [inline_file(path, local_name)] if path.is_file() else []

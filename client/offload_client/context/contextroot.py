"""Opens the root of a build context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_core.errors import ContextError
from offload_core.rootdir import RootDirectory

if TYPE_CHECKING:
    from pathlib import Path


def open_root(root: Path) -> RootDirectory:
    """Open the root of a build context; the caller closes it.

    Raises:
        ContextError: it is no directory or cannot be opened.
    """
    try:
        return RootDirectory(root)
    except OSError as error:
        raise ContextError(f"cannot read the build context {root}: {error.strerror}") from error

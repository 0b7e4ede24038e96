"""What a member has configured about synchronised directories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.context.statindex import index_path
from offload_client.settings import user_value
from offload_core.errors import ConfigError
from offload_core.treesync.replica import Limits
from offload_core.units import parse_size

if TYPE_CHECKING:
    from pathlib import Path

    from offload_client.invocation import Invocation

MAX_FILES = 200_000
MAX_BYTES = 20 << 30
DEFAULT_LIMITS = Limits(MAX_FILES, MAX_BYTES)


@dataclass(frozen=True, slots=True)
class BindSettings:
    """How directories are synchronised.

    Attributes:
        home: the member's home directory, which is not mounted.
        index: file with the digests that builds remember; None for none.
        limits: of each directory.
    """

    home: Path
    index: Path | None = None
    limits: Limits = DEFAULT_LIMITS

    @classmethod
    def of(cls, invocation: Invocation) -> BindSettings:
        """Return the settings of the member who runs a command.

        Raises:
            ConfigError: config.toml is wrong.
        """
        files, size_bytes = MAX_FILES, MAX_BYTES
        if text := user_value(invocation, "session_sync_files"):
            if not text.isdecimal() or not int(text):
                raise ConfigError(f'session_sync_files is "{text}", which is no number of files')
            files = int(text)
        if text := user_value(invocation, "session_sync_bytes"):
            size_bytes = parse_size(text)
        return cls(invocation.home(), index_path(invocation), Limits(files, size_bytes))

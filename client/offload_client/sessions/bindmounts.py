"""What the proxy of docker's API needs of synchronised directories."""

from __future__ import annotations

from typing import Any, Protocol


class BindMounts(Protocol):
    """Directories and files of this machine that containers of a session have."""

    async def prepare(self, source: str, *, read_only: bool) -> str:
        """Have a directory or file in the session, and keep it the same from now on.

        Args:
            source: path on this machine, absolute.
            read_only: nothing comes back.

        Returns:
            Its path in the engine's root file system.

        Raises:
            OffloadError: it cannot be synchronised; the sentence says why.
        """

    async def before_start(self) -> None:
        """Wait until what was changed here is in the session."""

    async def after_exit(self) -> None:
        """Wait until what containers have written is here."""

    def describe(self) -> list[dict[str, Any]]:
        """Return how each of them stands, as `offload status` tells it."""

    async def aclose(self) -> None:
        """End."""

"""The part of a display that one leg uses: steps that are the same on all nodes say whose they are.

BuildKit itself names the platform of the steps of a Dockerfile: "[linux/arm64 build 2/5] RUN".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.bake.targetdisplay import TargetDisplay

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.progress.display import Display


class LegDisplay(TargetDisplay):
    """One leg's part of the display of a build."""

    def __init__(self, joint: Display, platforms: Sequence[str]) -> None:
        """Take part in a display.

        Args:
            joint: shared with other legs; it is finished by its owner.
            platforms: of the leg.
        """
        super().__init__(joint, "+".join(platforms))
        self._named = tuple(f"[{platform}" for platform in platforms)

    def named(self, name: str) -> str:
        """Return the name of a step with the platforms of the leg, once."""
        # Cross-compiled stages have two: "[linux/amd64->arm64 build 2/5]".
        if name.startswith(self._named) or "->" in name.partition(" ")[0]:
            return name
        return super().named(name)

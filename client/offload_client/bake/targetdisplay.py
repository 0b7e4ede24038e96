"""One display for several builds: each line says its target.

Source of the names: buildx's util/progress, WithPrefix.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from offload_client.progress.attempts import renamed

if TYPE_CHECKING:
    from offload_client.progress.display import Display
    from offload_client.progress.local import LocalStep
    from offload_proto.v1.events_pb2 import ProgressBatch


class TargetDisplay:
    """The part of a display that one target uses; what it does not change, it hands on.

    Two targets may run the same step, for example pull the same base. Each tells of it from its
    own start to its own end, so each has a step of its own here.
    """

    def __init__(self, joint: Display, target: str) -> None:
        """Take part in a display.

        Args:
            joint: shared with other targets; it is finished by its owner.
            target: name of the target.
        """
        self._joint = joint
        self._target = target
        self._digests: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._joint, name)

    def feed(self, batch: ProgressBatch) -> None:
        """Show what happened in BuildKit."""
        own = renamed(batch, self.digest)
        for vertex in own.vertices:
            vertex.name = self.named(vertex.name)
            if vertex.progress_group:
                vertex.progress_group_name = self.named(vertex.progress_group_name)
        self._joint.feed(own)

    def local_step(self, name: str) -> LocalStep:
        """Start a step of the client itself."""
        step = self._joint.local_step(self.named(name))
        step.naming = self.named
        return step

    def notice(self, level: str, text: str) -> None:
        """Show a sentence."""
        self._joint.notice(level, f"{self._target}: {text}")

    def begin_again(self, text: str) -> None:
        """Show that this target starts once more; the others go on, and keep what is shown."""
        self.notice("warning", text)

    def named(self, name: str) -> str:
        """Return the name of a step with that of the target."""
        if name.startswith("["):
            return f"[{self._target} {name[1:]}"
        return f"[{self._target}] {name}"

    def digest(self, digest: str) -> str:
        """Return what stands for a step of this target."""
        own = self._digests.get(digest)
        if own is None:
            key = hashlib.sha256(f"{self._target}\0{digest}".encode()).hexdigest()
            own = self._digests[digest] = f"sha256:{key}" if digest else ""
        return own

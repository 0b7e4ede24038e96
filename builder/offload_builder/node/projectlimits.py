"""Bounds of single projects, as the gateway tells them; kept for starts without a gateway."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import structlog

from offload_core.smallfile import replace_small_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_proto.v1.nodes_service_pb2 import ProjectLimits

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProjectLimit:
    """Bounds of one project's layer cache; 0 leaves a bound to the node's configuration.

    Attributes:
        shared_keep_bytes: of its objects in the shared store.
        shared_idle_seconds: how long an entry may be of no use to any build.
        node_keep_bytes: of its blobs on this node's disk.
    """

    shared_keep_bytes: int = 0
    shared_idle_seconds: float = 0.0
    node_keep_bytes: int = 0


NO_LIMIT = ProjectLimit()


class LimitBook:
    """What is known about the bounds of projects, in one small file; belongs to the event loop."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier process wrote; a file that cannot be read counts as empty."""
        self._path = path
        self._limits: dict[str, ProjectLimit] = {}
        self._listeners: list[Callable[[], None]] = []
        try:
            raw = json.loads(path.read_text("utf-8"))
            self._limits = {str(name): ProjectLimit(**fields) for name, fields in raw.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("project.limits.unreadable", path=str(path), cause=str(error))

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change."""
        self._listeners.append(listener)

    def of(self, project_id: str) -> ProjectLimit:
        """Return the bounds of a project; all 0 when it has none of its own."""
        return self._limits.get(project_id, NO_LIMIT)

    def node_bounds(self) -> dict[str, int]:
        """Return the bytes on this disk of the projects that have a bound of their own there."""
        return {
            project_id: limit.node_keep_bytes
            for project_id, limit in self._limits.items()
            if limit.node_keep_bytes
        }

    def take(self, message: ProjectLimits) -> None:
        """Replace all bounds by those of a message."""
        limits = {
            item.project_id: ProjectLimit(
                shared_keep_bytes=max(0, item.shared_keep_bytes),
                shared_idle_seconds=max(0.0, float(item.shared_idle.seconds)),
                node_keep_bytes=max(0, item.node_keep_bytes),
            )
            for item in message.projects
        }
        if limits == self._limits:
            return
        self._limits = limits
        log.info("project.limits.changed", projects=sorted(limits))
        self._write()
        for listener in self._listeners:
            listener()

    def _write(self) -> None:
        document = {name: asdict(limit) for name, limit in self._limits.items()}
        try:
            replace_small_file(self._path, json.dumps(document).encode(), durable=True)
        except OSError as error:
            # The gateway tells them again at the next start.
            log.warning("project.limits.not_kept", path=str(self._path), cause=str(error))

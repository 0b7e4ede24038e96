"""What is known of the cache mounts of one daemon while builds use them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from offload_builder.node.mounts.bundle import CacheDirectory
    from offload_builder.node.mounts.naming import MountName


@dataclass(frozen=True, slots=True)
class MountSettings:
    """How cache mounts are handled.

    Attributes:
        node: name of this node, for the documents.
        platform: of the node; mounts of another platform are other mounts.
        max_bytes: bound of the content of one mount.
        interval_seconds: a mount is stored in one scope at most once in so long.
    """

    node: str
    platform: str
    max_bytes: int
    interval_seconds: float


@dataclass(slots=True)
class LiveMount:
    """A cache mount as this daemon has it.

    Attributes:
        directory: as the latest step saw it.
        name: None while it is not known.
        record: the daemon's record of it.
        users: steps that run with it.
        filling: the restore that its steps wait for.
        keeping: the task that stores it now.
        cold: seconds that steps took which began with it empty, by command.
        warm: the same of steps that began with content in it.
        kept_at: when it was stored last, by scope; seconds of the monotonic clock.
    """

    directory: CacheDirectory
    name: MountName | None = None
    record: str = ""
    users: int = 0
    filling: asyncio.Task[float] | None = None
    keeping: asyncio.Task[int | None] | None = None
    cold: dict[str, float] = field(default_factory=dict)
    warm: dict[str, float] = field(default_factory=dict)
    kept_at: dict[str, float] = field(default_factory=dict)

    def interrupt(self) -> None:
        """End what stores it: a step needs it now."""
        if self.keeping is not None:
            self.keeping.cancel()


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step that has ended.

    Attributes:
        seconds: how long it ran, without the wait for a restore.
        waited: how long it waited for one.
        cold: the mount was empty when it began.
    """

    snapshot: Path
    command: str
    seconds: float
    waited: float
    cold: bool


@dataclass(slots=True)
class BuildMounts:
    """A build and the cache mounts that its steps use.

    Attributes:
        read_scopes: where its mounts may come from, best first.
        write_scope: where they go; empty for nowhere.
        build_id: for the documents.
        tell: shows the user a line.
        touched: snapshots that steps used while it ran.
        times: of the steps that ended while it ran.
        worked: it has ended well.
    """

    read_scopes: tuple[str, ...]
    write_scope: str
    build_id: str
    tell: Callable[[str], Awaitable[None]] | None = None
    touched: set[Path] = field(default_factory=set)
    times: list[StepTime] = field(default_factory=list)
    worked: bool = False


@dataclass(slots=True)
class DueMount:
    """A mount that waits to be stored in a scope."""

    snapshot: Path
    scope: str
    build_id: str
    since: float = field(default_factory=time.monotonic)


def common_scopes(builds: Iterable[BuildMounts]) -> tuple[str, ...]:
    """Return the scopes that all builds may read, in the order of the first.

    A step belongs to no build: builds on one daemon share it, and the mount as well.
    """
    first, *others = [build.read_scopes for build in builds] or [()]
    return tuple(scope for scope in first if all(scope in other for other in others))

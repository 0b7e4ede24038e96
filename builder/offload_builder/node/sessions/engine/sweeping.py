"""Removes what a node that was killed has left of its engines.

Their processes end with it, and with them their mounts, namespaces and loop devices. Files and
control groups stay. Nothing of that is relied on here: all of it is looked for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.daemon_leftovers import mounts_below
from offload_builder.node.sessions.engine import kernel
from offload_builder.node.sessions.engine.dockerengine import remove_engine
from offload_builder.node.sessions.engine.groups import EngineGroups, sweep_groups
from offload_builder.node.sessions.engine.idranges import remove_unused
from offload_builder.node.sessions.engine.record import read_record, start_time

if TYPE_CHECKING:
    from pathlib import Path

    from offload_builder.node.sessions.engine.record import EngineRecord

_log = structlog.get_logger(__name__)
_END_SECONDS = 10.0
_POLL_SECONDS = 0.005
_FROZEN_SECONDS = 0.2
"""Who is not dead by then may be frozen."""


def sweep_engines(data: Path, kept: frozenset[str]) -> None:
    """Remove all engines of a node but some; blocks.

    Args:
        data: directory of all engines.
        kept: ids of those that stay.
    """
    folders = [path for path in data.glob("*") if path.is_dir() and path.name not in kept]
    records = [read_record(folder) for folder in folders]
    for record in records:
        record.kill()
    for folder, record in zip(folders, records, strict=True):
        _wait(record, EngineGroups(data, folder.name))
    for folder in folders:
        for point in reversed(mounts_below(folder)):
            _unmount(point)
        remove_engine(folder, EngineGroups(data, folder.name))
        _log.info("session.engine.swept", engine_id=folder.name)
    if not kept:
        sweep_groups(data)
    remove_unused()


def _unmount(point: str) -> None:
    try:
        kernel.unmount(point)
    except OSError as error:
        _log.warning("session.engine.mount_stuck", path=point, error=str(error))


def _wait(record: EngineRecord, groups: EngineGroups) -> None:
    """Wait until a process that was killed is gone; it may be the child of somebody else."""
    deadline = time.monotonic() + _END_SECONDS
    frozen = time.monotonic() + _FROZEN_SECONDS
    while record.pid and time.monotonic() < deadline:
        try:
            if start_time(record.pid) != record.started:
                return
        except OSError:
            return
        if time.monotonic() > frozen:
            groups.kill()
            frozen = time.monotonic() + _FROZEN_SECONDS
        time.sleep(_POLL_SECONDS)

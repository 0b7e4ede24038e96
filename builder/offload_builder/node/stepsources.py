"""Which step has which address in the network of its project's BuildKit.

The gate tells of each step before it runs. Its bundle names its network namespace, and the CNI
plugin host-local keeps a file for each address with the name of the namespace that has it. BuildKit
uses a namespace again when its step has ended, so the newest step with an address counts.
Sources: BuildKit's util/network/cniprovider; containernetworking/plugins, host-local's disk store.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.stepspec import read_specification

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from offload_builder.node.mounts.gate import Step

_log = structlog.get_logger(__name__)

MAX_ADDRESSES = 2048
_START_SECONDS = 0.015
"""runc needs longer before anything of a step runs: what is heard earlier is of the former one."""


@dataclass(eq=False, slots=True)
class KnownStep:
    """A step that runs, or has ended.

    Attributes:
        arguments: of its process.
        begun: when it was let run; seconds of the monotonic clock.
        begun_at: the same, in seconds since 1970.
        ended: set when its process is gone.
        vertex: digest of the step, once that is known.
    """

    arguments: tuple[str, ...]
    begun: float
    ended: asyncio.Event
    begun_at: float = field(default_factory=time.time)
    vertex: str = ""


class StepSources:
    """The steps of one daemon by their addresses. Belongs to the event loop.

    Attributes:
        leases: returns the directory of host-local's files; None while no daemon runs.
    """

    def __init__(self) -> None:
        self.leases: Callable[[], Path | None] = lambda: None
        self._by_address: OrderedDict[str, deque[KnownStep]] = OrderedDict()
        self._on_host: deque[KnownStep] = deque(maxlen=64)

    async def begin(self, step: Step) -> None:
        """Hear of a step that is about to run."""
        leases = self.leases()
        if leases is None:
            return
        try:
            arguments, addresses = await asyncio.to_thread(_read, step.bundle, leases)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("egress.step.unreadable", cause=f"{type(error).__name__}: {error}")
            return
        known = KnownStep(arguments, time.monotonic(), step.ended)
        if addresses is None:
            self._on_host.append(known)
            return
        for address in addresses:
            self._by_address.setdefault(address, deque(maxlen=2)).append(known)
            self._by_address.move_to_end(address)
        while len(self._by_address) > MAX_ADDRESSES:
            self._by_address.popitem(last=False)

    def at(self, address: str) -> KnownStep | None:
        """Return the step that has an address now, or had it last; None when there was none."""
        found = self._by_address.get(address)
        if not found:
            return None
        if len(found) > 1 and time.monotonic() - found[-1].begun < _START_SECONDS:
            return found[0]
        return found[-1]

    def running(self) -> list[KnownStep]:
        """Return the steps with addresses of their own that run now."""
        last = {id(steps[-1]): steps[-1] for steps in self._by_address.values()}
        return [step for step in last.values() if not step.ended.is_set()]

    def on_host(self) -> list[KnownStep]:
        """Return the steps that use the address of BuildKit and run now."""
        return [step for step in self._on_host if not step.ended.is_set()]


def _read(bundle: Path, leases: Path) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return what a step runs, and its addresses; None for those of BuildKit. Reads files.

    Raises:
        OSError: the step is gone.
        ValueError: it is no bundle.
    """
    config = read_specification(bundle)
    arguments = tuple(map(str, config["process"]["args"]))
    spaces = [item for item in config["linux"]["namespaces"] if item["type"] == "network"]
    if not spaces:
        return arguments, None
    owner = str(spaces[0].get("path", "")).rpartition("/")[2]
    # A step without a network has a namespace that nobody has named.
    return arguments, tuple(_addresses(leases, owner)) if owner else ()


def _addresses(leases: Path, owner: str) -> list[str]:
    found: list[str] = []
    for path in leases.iterdir():
        try:
            address = ipaddress.ip_address(path.name)
            # "NAMESPACE\r\nDEVICE"
            holder = path.read_text("utf-8", "replace").split("\n", 1)[0].strip()
        except (ValueError, FileNotFoundError):
            continue
        if holder == owner:
            found.append(str(address))
    return found

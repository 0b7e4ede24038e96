"""What sessions have for themselves: places, memory, disk and devices of their node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_core.devices import kind_of, means
from offload_core.errors import DeviceUnavailableError, QuotaExceededError
from offload_core.units import format_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from offload_builder.node.sessions.contract import EngineLimits
    from offload_proto.v1.nodes_service_pb2 import NodeDevice, NodeDevices

_ALL = "all"
_GPU = "/gpu"


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one session has.

    Attributes:
        limits: of its engine.
        devices: fully qualified.
    """

    limits: EngineLimits
    devices: tuple[str, ...]


class Reservations:
    """Of one node; belongs to the event loop.

    Args:
        slots: sessions that may be open.
        memory_bytes: that all may have together.
    """

    def __init__(self, slots: int, memory_bytes: int) -> None:
        self._slots = slots
        self._memory_bytes = memory_bytes
        self._held: dict[str, Reservation] = {}

    @property
    def slots_left(self) -> int:
        """How many sessions can still come."""
        return self._slots - len(self._held)

    def disk_bytes(self) -> int:
        """Return the disk that sessions may use, whether or not they do."""
        return sum(held.limits.disk_bytes for held in self._held.values())

    def devices(self) -> list[str]:
        """Return the devices that sessions have."""
        return sorted(name for held in self._held.values() for name in held.devices)

    def check_slot(self) -> None:
        """Raise when no session can come.

        Raises:
            QuotaExceededError: all places are taken.
        """
        if self.slots_left <= 0:
            raise QuotaExceededError(f"all {self._slots} sessions of this node are in use")

    def take(
        self, session_id: str, limits: EngineLimits, devices: tuple[str, ...], *, free_disk: int
    ) -> None:
        """Reserve for a session.

        Args:
            session_id: the session.
            limits: of its engine.
            devices: fully qualified; see `choose`.
            free_disk: bytes that no session may use yet.

        Raises:
            QuotaExceededError: there is not enough left.
        """
        self.check_slot()
        taken = sum(held.limits.memory_bytes for held in self._held.values())
        if (left := self._memory_bytes - taken) < limits.memory_bytes:
            raise QuotaExceededError(
                f"sessions of this node have {format_memory(max(0, left))} of memory left, "
                f"and this one needs {format_memory(limits.memory_bytes)}"
            )
        if free_disk < limits.disk_bytes:
            raise QuotaExceededError(
                f"sessions of this node have {format_memory(max(0, free_disk))} of disk left, "
                f"and this one needs {format_memory(limits.disk_bytes)}"
            )
        self._held[session_id] = Reservation(limits, devices)

    def give_back(self, session_id: str) -> None:
        """Let others have what a session had."""
        self._held.pop(session_id, None)

    def choose(
        self, wanted: Sequence[str], *, gpu: bool, found: NodeDevices | None
    ) -> tuple[str, ...]:
        """Return the devices that a session gets, each of which no other session has.

        Args:
            wanted: names; VENDOR/CLASS stands for any one device of the kind.
            gpu: any one device whose class is "gpu".
            found: the node's; None while they are not known.

        Raises:
            DeviceUnavailableError: the node has no such device.
            QuotaExceededError: other sessions have it.
        """
        known = list(found.devices) if found is not None else []
        busy, chosen = self.devices(), list[str]()
        for name in wanted:
            choices = [item for item in known if means(name, item.name, item.alias)]
            chosen += _first_free(name, choices, busy, chosen)
        if gpu and not any(kind_of(name).endswith(_GPU) for name in chosen):
            choices = [item for item in known if kind_of(item.name).endswith(_GPU)]
            chosen += _first_free("a GPU", choices, busy, chosen)
        return tuple(chosen)


def _first_free(
    wanted: str, choices: Sequence[NodeDevice], busy: Iterable[str], chosen: Sequence[str]
) -> list[str]:
    """Return the device that is meant, as a list; none when the session has got it already."""
    if not choices:
        raise DeviceUnavailableError(
            f"this node has no device {wanted}" if "/" in wanted else "this node has no GPU"
        )
    names = sorted((item.name for item in choices), key=_preference)
    if any(name in chosen for name in names):
        return []
    busy = list(busy)
    for name in names:
        if not any(_overlap(name, other) for other in busy):
            return [name]
    raise QuotaExceededError(f"other sessions have {wanted} of this node")


def _preference(name: str) -> tuple[bool, bool, str]:
    """Return what sorts single devices before all of a kind, and numbers before other names."""
    last = name.partition("=")[2]
    return last == _ALL, not last[:1].isdigit(), name


def _overlap(one: str, other: str) -> bool:
    """Return whether two names may mean the same device.

    A device mostly has several names of a kind: its number, its serial number, and "all".
    """
    if kind_of(one) != kind_of(other):
        return False
    first, second = one.partition("=")[2], other.partition("=")[2]
    if first == second or _ALL in (first, second):
        return True
    return first[:1].isdigit() != second[:1].isdigit()

"""Which node takes which session, as pure functions over snapshots.

The nodes with the fewest sessions come first. Among equals the order is the one in which the builds
of the project go to nodes, so that a session finds what was built there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_builder.gateway.scheduler import NodeDevice, rank_nodes
from offload_core.devices import kind_of, means
from offload_core.errors import DeviceUnavailableError, NotFoundError, OffloadError
from offload_core.units import format_memory, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HINT_DEVICES = (
    "an administrator adds a device with a node that has it and a CDI specification of it; "
    "docs/devices.md says how"
)
HINT_LABELS = "leave --node-label out, or name a label that is there"
HINT_NO_NODE = "ask an administrator for a node that takes sessions: one behind its firewall"
HINT_SIZE = "ask for less, or leave the option out for the node's default"
_MAX_NAMED = 12


@dataclass(frozen=True)
class SessionWish:
    """What a session needs of its node.

    Attributes:
        project_id: whose it is.
        devices: names, by the Container Device Interface.
        gpu: any GPU.
        cpu_millis: thousandths of a processor; 0 for the node's default, as for the others.
        memory_bytes: of memory.
        disk_bytes: of disk.
        labels: that the node must have.
        avoid: nodes that are not asked now.
    """

    project_id: str
    devices: tuple[str, ...] = ()
    gpu: bool = False
    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    labels: frozenset[tuple[str, str]] = frozenset()
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SessionNode:
    """A node as far as placing sessions needs it.

    Attributes:
        node_id: its name.
        slots: sessions that may be open at once; 0 where it takes none.
        load: sessions that are open or being made.
        draining: it takes nothing new.
        problem: why it takes no sessions now; empty when it does.
        project_ids: that it serves; empty for all.
        labels: of its configuration.
        devices: that it has.
        taken: devices that sessions have for themselves.
        cpu_millis: the most that one session gets; 0 where that is not known, as for the others.
        memory_bytes: of memory.
        disk_bytes: of disk.
    """

    node_id: str
    slots: int
    load: int = 0
    draining: bool = False
    problem: str = ""
    project_ids: frozenset[str] = frozenset()
    labels: frozenset[tuple[str, str]] = frozenset()
    devices: frozenset[NodeDevice] = frozenset()
    taken: frozenset[str] = field(default_factory=frozenset)
    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0

    def suits(self, wish: SessionWish) -> bool:
        """Return whether it could take a session if nothing else were there."""
        return (
            self.slots > 0
            and (not self.project_ids or wish.project_id in self.project_ids)
            and not self.lacking_labels(wish)
            and not self.lacking_devices(wish)
            and not self.too_small(wish)
        )

    def lacking_labels(self, wish: SessionWish) -> list[str]:
        """Return which labels it does not have."""
        return [f"{key}={value}" for key, value in sorted(wish.labels - self.labels)]

    def lacking_devices(self, wish: SessionWish) -> list[str]:
        """Return which devices it does not have."""
        lacking = [
            wanted
            for wanted in wish.devices
            if not any(means(wanted, device.name, device.alias) for device in self.devices)
        ]
        if wish.gpu and not any(is_gpu(device.name) for device in self.devices):
            lacking.append("GPU")
        return lacking

    def too_small(self, wish: SessionWish) -> bool:
        """Return whether it gives no session so much."""
        wanted = (wish.cpu_millis, wish.memory_bytes, wish.disk_bytes)
        most = (self.cpu_millis, self.memory_bytes, self.disk_bytes)
        return any(bound and need > bound for need, bound in zip(wanted, most, strict=True))

    def pick(self, wish: SessionWish) -> tuple[str, ...] | None:
        """Return free devices for a session; None when what it wants is taken."""
        picked: list[str] = []
        for wanted in wish.devices:
            free = [
                device.name
                for device in self.devices
                if means(wanted, device.name, device.alias) and self._free(device.name, picked)
            ]
            if not free:
                return None
            picked.append(min(free, key=_preference))
        if wish.gpu and not any(is_gpu(name) for name in picked):
            free = [
                device.name
                for device in self.devices
                if is_gpu(device.name) and self._free(device.name, picked)
            ]
            if not free:
                return None
            picked.append(min(free, key=_preference))
        return tuple(picked)

    def _free(self, device: str, picked: Sequence[str]) -> bool:
        return not any(overlap(device, other) for other in (*self.taken, *picked))

    def available(self) -> bool:
        """Return whether it takes one more session."""
        return not self.draining and not self.problem and self.load < self.slots


def is_gpu(device: str) -> bool:
    """Return whether a fully qualified name is one of a GPU: its class says so."""
    return kind_of(device).rpartition("/")[2] == "gpu"


def overlap(one: str, other: str) -> bool:
    """Return whether two devices are the same, or one is all of the other's kind."""
    if one == other:
        return True
    return kind_of(one) == kind_of(other) and (one.endswith("=all") or other.endswith("=all"))


def _preference(device: str) -> tuple[bool, bool, str]:
    """One before all of a kind, an index before other names of the same device."""
    name = device.partition("=")[2]
    return name == "all", not name.isdigit(), name.rjust(20)


def candidates(wish: SessionWish, nodes: Iterable[SessionNode]) -> list[str]:
    """Return the nodes that may be asked to make a session, best first."""
    usable = {
        node.node_id: node
        for node in nodes
        if node.node_id not in wish.avoid
        and node.suits(wish)
        and node.available()
        and node.pick(wish) is not None
    }
    ranked = rank_nodes(wish.project_id, frozenset(usable))
    return sorted(ranked, key=lambda node_id: usable[node_id].load)


def refusal(wish: SessionWish, nodes: Sequence[SessionNode]) -> OffloadError | None:
    """Return why no node will ever make a session; None when one may.

    Args:
        wish: what it needs.
        nodes: all that the pool has, those that are away as well; without any a session waits.
    """
    serving = [n for n in nodes if not n.project_ids or wish.project_id in n.project_ids]
    if not serving or any(node.suits(wish) for node in serving):
        return None
    taking = [node for node in serving if node.slots > 0]
    if not taking:
        return NotFoundError(f"no node of this pool takes sessions{_why(serving)}",
                             hint=HINT_NO_NODE)  # fmt: skip
    labels = sorted({f"{key}={value}" for node in taking for key, value in node.labels})
    if all(node.lacking_labels(wish) for node in taking):
        wanted = [f"{key}={value}" for key, value in sorted(wish.labels)]
        offer = f"they have {_list(labels)}" if labels else "they have no labels"
        return NotFoundError(
            f"no node that takes sessions has the label {_list(wanted)}; {offer}",
            hint=HINT_LABELS,
        )
    if all(node.lacking_devices(wish) for node in taking):
        wanted = [*(["a GPU"] if wish.gpu else []),
                  *(f"the device {name}" for name in wish.devices)]  # fmt: skip
        names = sorted({device.name for node in taking for device in node.devices})
        offer = f"they have {_list(names)}" if names else "they have no devices"
        return DeviceUnavailableError(
            f"no node that takes sessions has {_list(wanted)}; {offer}", hint=HINT_DEVICES
        )
    if all(node.too_small(wish) for node in taking):
        return _too_large(wish, taking)
    return NotFoundError(
        "no node that takes sessions has the labels, the devices and the size that you ask for "
        f"together; there are {len(taking)} such nodes",
        hint="ask for less of it",
    )


def _too_large(wish: SessionWish, nodes: Sequence[SessionNode]) -> OffloadError:
    measures = (
        ("memory_bytes", "of memory", format_memory),
        ("cpu_millis", "processors", lambda millis: f"{millis / 1000:g}"),
        ("disk_bytes", "of disk", format_size),
    )
    for name, word, show in measures:
        need, most = getattr(wish, name), [getattr(node, name) for node in nodes]
        if all(bound and need > bound for bound in most):
            return NotFoundError(
                f"no node gives a session {show(need)} {word}; the most that one gives is "
                f"{show(max(most))}",
                hint=HINT_SIZE,
            )
    return NotFoundError(
        "no node gives a session as many processors, memory and disk together", hint=HINT_SIZE
    )


def waiting_reason(wish: SessionWish, nodes: Sequence[SessionNode]) -> str:
    """Return in one sentence why a session waits.

    Args:
        wish: what it needs.
        nodes: that are attached now.
    """
    if not nodes:
        return "no node is attached"
    serving = [n for n in nodes if not n.project_ids or wish.project_id in n.project_ids]
    if not serving:
        return f'no node serves the project "{wish.project_id}"'
    suiting = [node for node in serving if node.suits(wish)]
    if not suiting:
        error = refusal(wish, nodes)
        return f"{error.message}, but one may still come" if error else "no node suits it"
    ready = [node for node in suiting if not node.draining and not node.problem]
    if not ready:
        troubled = next((node for node in suiting if node.problem), None)
        if troubled is not None:
            return f"node {troubled.node_id} takes no sessions now: {troubled.problem}"
        return _all(suiting, "draining")
    free = [node for node in ready if node.load < node.slots]
    if not free:
        return _all(ready, "full of sessions")
    if all(node.pick(wish) is None for node in free):
        wanted = _list([*wish.devices, *(["its GPU"] if wish.gpu else [])])
        return f"other sessions have {wanted}"
    if all(node.node_id in wish.avoid for node in free):
        return "the free nodes could not take it; they are asked again"
    return "other sessions are before it"


def _why(nodes: Sequence[SessionNode]) -> str:
    troubled = next((node for node in nodes if node.problem), None)
    return f": node {troubled.node_id}: {troubled.problem}" if troubled is not None else ""


def _all(nodes: Sequence[SessionNode], state: str) -> str:
    if len(nodes) == 1:
        return f"the only node that can take it, {nodes[0].node_id}, is {state}"
    return f"all {len(nodes)} nodes that can take it are {state}"


def _list(items: Sequence[str]) -> str:
    shown = list(items[:_MAX_NAMED])
    if len(items) > _MAX_NAMED:
        return f"{', '.join(shown)} and {len(items) - _MAX_NAMED} more"
    *first, last = shown or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last

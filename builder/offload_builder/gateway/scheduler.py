"""Who runs where, as pure functions over snapshots.

Order of the queue: round robin over projects, the one that was served longest ago first; within a
project first come, first served. Place of a build: nodes that have the least to emulate of what is
wanted, and have its devices; as long as one of them is attached, others get nothing. Among these
comes the node of a session of the same member first; of the others, rendezvous hashing gives each
project its own ranking, so that its caches stay warm on the same few, with bounded loads so that a
busy project spills over before its first node is full (Thaler and Ravishankar, "Using name-based
mappings to increase hit rates", 1998; Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with
bounded loads", 2018).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from offload_core.devices import ANY_DEVICE, means

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DEFAULT_LOAD_FACTOR = 1.5
"""Share of the mean load that a node may have before a project spills to its next one."""


@dataclass(frozen=True)
class QueuedBuild:
    """A build that waits."""

    build_id: str
    project_id: str
    arrival: int
    """Grows with every build that enters the queue."""
    platforms: tuple[str, ...] = ()
    """Normalised; empty for any."""
    preferred: str = ""
    """Normalised platform of the client, where it wants none; empty for unknown."""
    declined_by: frozenset[str] = frozenset()
    """Nodes that are not asked again for now."""
    last_choice: str = ""
    """Node that is asked when no other one has room: an earlier run was lost with it."""
    session_node: str = ""
    """Node with a session of whoever builds, where the image is then at hand; empty for none."""
    only_node: str = ""
    """Node that its client is connected to; empty for any."""
    behind_firewall: bool = False
    """It brings a network policy, which only some nodes enforce."""
    devices: tuple[str, ...] = ()
    """Names; `ANY_DEVICE` for whatever there is."""


@dataclass(frozen=True)
class NodeDevice:
    """A device of a node: its full name, and a further one or none."""

    name: str
    alias: str = ""


@dataclass(frozen=True)
class NodeView:
    """A node as far as placing builds needs it."""

    node_id: str
    slots: int
    load: int
    """Builds that run there or have a slot reserved."""
    platforms: frozenset[str]
    """What it builds natively, normalised."""
    emulated: frozenset[str] = frozenset()
    """What it builds with emulation, normalised."""
    draining: bool = False
    project_ids: frozenset[str] = field(default_factory=frozenset)
    """Projects that it serves; empty for all."""
    firewall: bool = False
    """Its builds are behind a firewall."""
    devices: frozenset[NodeDevice] = frozenset()

    def free(self) -> bool:
        """Return whether it would take one more build."""
        return not self.draining and self.load < self.slots

    def suits(self, build: QueuedBuild) -> bool:
        """Return whether it could run this build if it were free."""
        if build.only_node not in ("", self.node_id):
            return False
        if build.behind_firewall and not self.firewall:
            return False
        if not self.serves(build.project_id) or self.lacking(build.devices):
            return False
        return self.builds(build.platforms)

    def builds(self, platforms: Iterable[str]) -> bool:
        """Return whether it builds all these platforms, natively or not."""
        return all(item in self.platforms or item in self.emulated for item in platforms)

    def lacking(self, devices: Iterable[str]) -> list[str]:
        """Return which of these devices it does not have."""
        return [
            wanted
            for wanted in devices
            if wanted != ANY_DEVICE
            and not any(means(wanted, device.name, device.alias) for device in self.devices)
        ]

    def strangeness(self, build: QueuedBuild) -> int:
        """Return how many platforms of a build it would have to emulate, and which wish it lacks.

        A build that may use any device has its wish where there is one.
        """
        wish = int(ANY_DEVICE in build.devices and not self.devices)
        if not build.platforms and build.preferred:
            return wish + int(build.preferred not in self.platforms)
        return wish + sum(item not in self.platforms for item in build.platforms)

    def serves(self, project_id: str) -> bool:
        """Return whether it runs builds of a project."""
        return not self.project_ids or project_id in self.project_ids


def normalise_platform(platform: str) -> str:
    """Return a platform with the variants left out that are the default of their architecture.

    Source: containerd's platform specifiers, "normalization": arm64/v8 is arm64, arm is arm/v7,
    x86_64 is amd64, aarch64 is arm64.
    """
    parts = platform.strip().lower().split("/")
    if len(parts) < 2:
        return platform.strip().lower()
    system, machine, variant = parts[0], parts[1], "/".join(parts[2:])
    machine = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    if (machine, variant) in (("arm64", "v8"), ("amd64", "v1")):
        variant = ""
    if (machine, variant) == ("arm", ""):
        variant = "v7"
    return "/".join(part for part in (system, machine, variant) if part)


def fair_order(queue: Iterable[QueuedBuild], served: Mapping[str, int]) -> list[QueuedBuild]:
    """Return the builds in the order in which they are offered to nodes.

    Args:
        queue: in any order.
        served: by project, a number that grows each time one of its builds is placed; a project
            without a number has never been served and comes first.
    """
    by_project: dict[str, list[QueuedBuild]] = {}
    for build in sorted(queue, key=lambda build: build.arrival):
        by_project.setdefault(build.project_id, []).append(build)
    projects = sorted(
        by_project, key=lambda project: (served.get(project, -1), by_project[project][0].arrival)
    )
    rounds = zip_longest(*(by_project[project] for project in projects))
    return [build for turn in rounds for build in turn if build is not None]


@lru_cache(maxsize=4096)
def rank_nodes(project_id: str, node_ids: frozenset[str]) -> tuple[str, ...]:
    """Return the nodes in a project's own order of preference.

    A node that comes or goes does not change the order of the others.
    """

    def weight(node_id: str) -> bytes:
        return hashlib.sha256(f"{project_id}\0{node_id}".encode()).digest()

    return tuple(sorted(node_ids, key=weight, reverse=True))


def candidates(
    build: QueuedBuild,
    nodes: Sequence[NodeView],
    load_factor: float = DEFAULT_LOAD_FACTOR,
) -> list[str]:
    """Return the nodes that may be asked to run a build, best first.

    Every node with a free slot that suits, and of these the ones that have the least to emulate, is
    in the list; one with a session of the member comes first, nodes above the bound come last.
    """
    suiting = [node for node in nodes if not node.draining and node.suits(build)]
    least = min((node.strangeness(build) for node in suiting), default=0)
    usable = {node.node_id: node for node in suiting if node.strangeness(build) == least}
    slots = sum(node.slots for node in usable.values())
    load = sum(node.load for node in usable.values())
    within: list[str] = []
    above: list[str] = []
    for node_id in rank_nodes(build.project_id, frozenset(usable)):
        node = usable[node_id]
        if not node.free() or node_id in build.declined_by:
            continue
        bound = math.ceil(load_factor * (load + 1) * node.slots / slots)
        (within if node.load < bound else above).append(node_id)
    # An image at hand is worth more than a warm disk: all nodes share the cache.
    within.sort(key=lambda node_id: node_id != build.session_node)
    return sorted(within + above, key=lambda node_id: node_id == build.last_choice)


def plan(
    order: Sequence[QueuedBuild],
    nodes: Sequence[NodeView],
    load_factor: float = DEFAULT_LOAD_FACTOR,
) -> dict[str, str]:
    """Return which node to ask for which build, by build id.

    A build that nobody can take now does not hold back the ones behind it.
    """
    views = {node.node_id: node for node in nodes}
    free = sum(max(0, node.slots - node.load) for node in nodes if node.free())
    result: dict[str, str] = {}
    for build in order:
        if free == 0:
            break
        best = candidates(build, list(views.values()), load_factor)
        if not best:
            continue
        node = views[best[0]]
        views[node.node_id] = replace(node, load=node.load + 1)
        result[build.build_id] = node.node_id
        free -= 1
    return result


def waiting_reason(build: QueuedBuild, nodes: Sequence[NodeView]) -> str:
    """Return in one sentence why a build waits."""
    if not nodes:
        return "no node is attached"
    if build.only_node:
        return _waiting_reason_at(build, nodes)
    serving = [node for node in nodes if node.serves(build.project_id)]
    if not serving:
        return f'no node serves the project "{build.project_id}"'
    wanted = " and ".join(build.platforms)
    suiting = [node for node in serving if node.suits(build)]
    if not suiting:
        return _nobody(build)
    which = f" that build{'s' if len(suiting) == 1 else ''} {wanted}" if build.platforms else ""
    if named := [item for item in build.devices if item != ANY_DEVICE]:
        which = f" with {' and '.join(named)}"
    if len(suiting) == len(nodes):
        which = ""
    if all(node.draining for node in suiting):
        return _all(suiting, which, "draining")
    active = [node for node in suiting if not node.draining]
    least = min(node.strangeness(build) for node in active)
    active = [node for node in active if node.strangeness(build) == least]
    if ANY_DEVICE in build.devices and len(active) < len(suiting):
        which = " with a device"
    elif not least and len(active) < len(suiting):
        wanted = wanted or build.preferred
        which = f" that build{'s' if len(active) == 1 else ''} {wanted} natively"
    if not any(node.free() for node in active):
        return _all(active, which, "busy")
    if all(node.node_id in build.declined_by for node in active if node.free()):
        return "the free nodes declined the build for now"
    return "other builds are before it"


def _nobody(build: QueuedBuild) -> str:
    wishes = []
    if build.platforms:
        wishes.append(f"builds {' and '.join(build.platforms)}")
    if named := [item for item in build.devices if item != ANY_DEVICE]:
        wishes.append(f"has {' and '.join(named)}")
    if build.behind_firewall:
        wishes.append("enforces network policies of builds")
    together = " together" if len(build.platforms) > 1 and not named else ""
    return f"no node {' and '.join(wishes)}{together}"


def _waiting_reason_at(build: QueuedBuild, nodes: Sequence[NodeView]) -> str:
    name = build.only_node
    node = next((node for node in nodes if node.node_id == name), None)
    if node is None:
        return f"node {name}, to which you are connected, is away"
    if not node.serves(build.project_id):
        return f'node {name} does not serve the project "{build.project_id}"'
    if lacking := node.lacking(build.devices):
        return f"node {name} does not have {' and '.join(lacking)}"
    if not node.suits(build):
        return f"node {name} does not build {' and '.join(build.platforms)}"
    if node.draining:
        return f"node {name} is draining"
    if not node.free():
        return f"node {name} is busy" + _better(build, nodes)
    if name in build.declined_by:
        return f"node {name} declined the build for now"
    return "other builds are before it"


def _better(build: QueuedBuild, nodes: Sequence[NodeView]) -> str:
    """Return where a build would run now if its client came again; empty for nowhere."""
    found = candidates(replace(build, only_node="", declined_by=frozenset()), nodes)
    if not found:
        return ""
    return f"; node {found[0]} is free now: start the command again to build there"


def _all(nodes: Sequence[NodeView], which: str, state: str) -> str:
    if len(nodes) == 1:
        return f"the only node{which} is {state}"
    return f"all {len(nodes)} nodes{which} are {state}"

"""Which devices the nodes of a pool have: what goes to which node, and what no node can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_builder.gateway.scheduler import normalise_platform
from offload_core.devices import ANY_DEVICE, MAX_NAME, kind_of
from offload_core.errors import DeviceUnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.gateway.nodes import NodeRegistry
    from offload_builder.gateway.platforms import PoolPlatforms
    from offload_builder.gateway.scheduler import NodeView, QueuedBuild

MAX_DEVICES = 50
HINT = (
    "an administrator adds a device with a node that has it and a CDI specification of it; "
    "docs/devices.md says how"
)
HINT_CONNECTED = (
    "build with offload-build, which goes to the node that has a device, or with a project that is "
    "served only by nodes that have it"
)


class PoolDevices:
    """What the nodes of a pool have. Belongs to the event loop.

    Args:
        nodes: of the pool.
        platforms: of the pool; knows when nodes have had their time to attach.
    """

    def __init__(self, nodes: NodeRegistry, platforms: PoolPlatforms) -> None:
        self._nodes = nodes
        self._platforms = platforms

    def refusal(
        self,
        project_id: str,
        devices: Sequence[str],
        platforms: Sequence[str] = (),
        only_node: str = "",
    ) -> DeviceUnavailableError | None:
        """Return why a build will never have its devices; None when it may.

        Args:
            project_id: of the build.
            devices: that it wants.
            platforms: that it wants; some node builds them.
            only_node: to which its client is connected; empty for any node.
        """
        nodes = self._platforms.serving(project_id)
        wanted = [item for item in devices if item != ANY_DEVICE]
        if not wanted or not nodes or not self._platforms.settled(nodes):
            return None
        views = [node.view() for node in nodes]
        if only_node:
            here = next((view for view in views if view.node_id == only_node), None)
            if here is not None and (lacking := here.lacking(wanted)):
                return _refused_at(here, lacking, views)
        plain = [normalise_platform(item) for item in platforms]
        having = [view for view in views if not view.lacking(wanted)]
        if any(view.builds(plain) for view in having):
            return None
        if having:
            names = sorted(view.node_id for view in having)
            return DeviceUnavailableError(
                f"no node of this pool that builds {_list(platforms)} has the device "
                f"{_list(wanted)}; node {_list(names)} has it for other platforms",
                hint=HINT,
            )
        alone = [item for item in wanted if all(view.lacking((item,)) for view in views)]
        if alone:
            text = f"no node of this pool has the device {_list(alone, 'or')}; {_offer(views)}"
        else:
            text = f"no node of this pool has {_list(wanted)} together; {_offer(views)}"
        return DeviceUnavailableError(text, hint=HINT)

    def is_far(
        self, project_id: str, devices: Sequence[str], platforms: Sequence[str] = ()
    ) -> bool:
        """Return whether no node that is attached has all of these, and builds for these."""
        wanted = [item for item in devices if item != ANY_DEVICE]
        if not wanted:
            return False
        return not any(
            view.serves(project_id) and view.builds(platforms) and not view.lacking(wanted)
            for view in (node.view() for node in self._nodes.connected())
        )

    def awaited(self, build: QueuedBuild, connected: Sequence[NodeView]) -> str:
        """Return which node that is away a build waits for; empty when it waits for no such."""
        if not build.devices or any(node.suits(build) for node in connected):
            return ""
        for node in self._nodes.known():
            if node.connection is None and node.view().suits(build):
                return f"node {node.node_id}, which has {_list(build.devices)}, is away"
        nodes = self._platforms.serving(build.project_id)
        if (
            nodes
            and self.is_far(build.project_id, build.devices)
            and not self._platforms.settled(nodes)
        ):
            wanted = _list(build.devices)
            return f"no node has {wanted}, but not all nodes have told yet what they have"
        return ""


def check_devices(devices: Sequence[str]) -> None:
    """Refuse more than a build can want.

    Raises:
        UsageError: with the bounds.
    """
    if len(devices) > MAX_DEVICES or any(len(item) > MAX_NAME for item in devices):
        raise UsageError(
            f"a build request names at most {MAX_DEVICES} devices of at most {MAX_NAME} characters"
        )


def _refused_at(
    node: NodeView, lacking: Sequence[str], views: Sequence[NodeView]
) -> DeviceUnavailableError:
    others = sorted(view.node_id for view in views if not view.lacking(lacking))
    where = f"node {_list(others, 'or')} has it" if others else _offer(views)
    return DeviceUnavailableError(
        f"node {node.node_id}, to which you are connected, has no device {_list(lacking, 'or')}; "
        f"{where}",
        hint=HINT_CONNECTED if others else HINT,
    )


def _offer(views: Sequence[NodeView]) -> str:
    """Say what the pool has: names of a few, kinds of many."""
    names = sorted({device.name for view in views for device in view.devices})
    if not names:
        return "its nodes have no devices"
    if len(names) > 8:
        names = sorted({kind_of(name) for name in names})
    return f"its nodes have {_list(names)}"


def _list(items: Sequence[str], word: str = "and") -> str:
    shown = ["a device" if item == ANY_DEVICE else item for item in items]
    *first, last = shown or ["nothing"]
    return f"{', '.join(first)} {word} {last}" if first else last

"""Which platforms a pool can build: what goes to one node, and what no node can do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_builder.gateway.scheduler import normalise_platform
from offload_core.errors import NotFoundError, PlatformUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload_builder.gateway.nodes import AttachedNode, NodeRegistry
    from offload_builder.gateway.scheduler import NodeView, QueuedBuild

HINT = (
    "an administrator adds a platform with a node of that kind, or with QEMU (binfmt_misc) on a "
    "node; Dockerfiles that cross-compile need only emulated_platforms in a node's configuration"
)


class PoolPlatforms:
    """What the nodes of a pool build together. Belongs to the event loop.

    Args:
        nodes: of the pool.
        settle_seconds: how long nodes may take to attach after the gateway has started; until
            then nothing is refused.
    """

    def __init__(self, nodes: NodeRegistry, settle_seconds: float) -> None:
        self._nodes = nodes
        self._settle_seconds = settle_seconds
        self._settled_at: float | None = None

    def begin(self, look: Callable[[], None]) -> None:
        """Count the time from now on; `look` is called when nodes have had their time."""
        loop = asyncio.get_running_loop()
        self._settled_at = loop.time() + self._settle_seconds
        loop.call_later(self._settle_seconds + 0.01, look)

    def groups(self, project_id: str, platforms: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the platforms, those together that one node is to build.

        Raises:
            PlatformUnavailableError: no node of the pool builds one of them.
        """
        if problem := self._problem(project_id, platforms, together=False):
            raise problem
        known = [node.view() for node in self.serving(project_id)]
        here = [
            view
            for node in self.serving(project_id)
            if node.connection is not None and not (view := node.view()).draining
        ]
        return platform_groups(platforms, here, known)

    def refusal(self, project_id: str, platforms: Sequence[str]) -> PlatformUnavailableError | None:
        """Return why no node will ever build all of this; None when one may."""
        return self._problem(project_id, platforms, together=True)

    def no_firewall(self, project_id: str) -> NotFoundError | None:
        """Return why no node can enforce the network policy of a build; None when one may."""
        nodes = self.serving(project_id)
        if not nodes or any(node.hello.firewall for node in nodes) or not self._had_their_time():
            return None
        return NotFoundError(
            "no node of this pool is behind a firewall, so none can enforce --network-policy",
            hint="ask an administrator for a node with isolation = netns, or leave the flag out",
        )

    def is_far(self, project_id: str, platforms: Sequence[str]) -> bool:
        """Return whether no node that is attached builds all of these normalised platforms."""
        return bool(platforms) and not any(
            node.platforms.union(node.emulated).issuperset(platforms)
            and node.view().serves(project_id)
            for node in self._nodes.connected()
        )

    def awaited(self, build: QueuedBuild, connected: Sequence[NodeView]) -> str:
        """Return which node that is away a build waits for; empty when it waits for no such."""
        if not build.platforms or any(node.suits(build) for node in connected):
            return ""
        wanted = " and ".join(build.platforms)
        for node in self._nodes.known():
            if node.connection is None and node.view().suits(build):
                return f"node {node.node_id}, which builds {wanted}, is away"
        nodes = self.serving(build.project_id)
        silent = any(node.connection is not None and not node.surveyed for node in nodes)
        if nodes and not silent and not self.settled(nodes):
            return f"no node builds {wanted}, but the gateway has just started; one may still come"
        return ""

    def _problem(
        self, project_id: str, platforms: Sequence[str], *, together: bool
    ) -> PlatformUnavailableError | None:
        nodes = self.serving(project_id)
        if not platforms or not nodes or not self.settled(nodes):
            # Without any node a build waits: the pool may be about to start one.
            return None
        views = [node.view() for node in nodes]
        wanted = {item: normalise_platform(item) for item in platforms}
        lacking = [
            item
            for item, plain in wanted.items()
            if not any(view.builds((plain,)) for view in views)
        ]
        if not lacking:
            if not together or any(view.builds(wanted.values()) for view in views):
                return None
            return PlatformUnavailableError(
                f"no node of this pool builds {_list(platforms)} together; {_offer(nodes)}",
                hint="update this offload-build, which asks one node for all of them",
            )
        return PlatformUnavailableError(
            f"no node of this pool builds {_list(lacking, 'or')}; {_offer(nodes)}", hint=HINT
        )

    def serving(self, project_id: str) -> list[AttachedNode]:
        """Return the nodes that are there or may come back and serve a project."""
        return [node for node in self._nodes.known() if node.view().serves(project_id)]

    def settled(self, nodes: Sequence[AttachedNode]) -> bool:
        """Return whether all nodes have had their time to attach, and have told what they are."""
        if any(node.connection is not None and not node.surveyed for node in nodes):
            return False
        return self._had_their_time()

    def _had_their_time(self) -> bool:
        now = asyncio.get_running_loop().time()
        return self._settled_at is not None and now >= self._settled_at


def platform_groups(
    platforms: Sequence[str], here: Sequence[NodeView], known: Sequence[NodeView]
) -> list[tuple[str, ...]]:
    """Return the platforms, those together that one node is to build.

    One node that builds all of them natively builds all. Else each platform goes where it is
    native, as few builds as possible; what is native nowhere goes to a node that emulates it, to
    one that builds another part where that is possible.

    Args:
        platforms: as the user named them, in the order wanted.
        here: nodes that can be asked.
        known: these, and those that may come back.
    """
    plain = {item: normalise_platform(item) for item in platforms}
    native: list[list[str]] = []
    rest = list(plain)
    while rest:
        found = max(
            ([item for item in rest if plain[item] in node.platforms] for node in here),
            key=len,
            default=[],
        )
        if not found:
            break
        native.append(found)
        rest = [item for item in rest if item not in found]
    groups = native
    for item in rest:
        joined = next((group for group in groups if _one_builds(group, item, plain, here)), None)
        if joined is None and not any(node.builds((plain[item],)) for node in here):
            able = (group for group in groups if _one_builds(group, item, plain, known))
            joined = next(able, None)
            if joined is not None and any(node.builds([plain[i] for i in joined]) for node in here):
                # A node that is here does not wait for one that is away.
                joined = None
        if joined is None:
            groups.append([item])
        else:
            joined.append(item)
    order = {item: number for number, item in enumerate(platforms)}
    ordered = [tuple(sorted(group, key=order.__getitem__)) for group in groups]
    return sorted(ordered, key=lambda group: order[group[0]])


def _one_builds(
    group: Sequence[str], item: str, plain: dict[str, str], nodes: Sequence[NodeView]
) -> bool:
    """Whether one node builds a group as natively as any does, and one platform more."""
    names = [plain[one] for one in group]
    own = [name for name in names if any(name in node.platforms for node in nodes)]
    return any(
        node.platforms.issuperset(own) and node.builds((*names, plain[item])) for node in nodes
    )


def _offer(nodes: Sequence[AttachedNode]) -> str:
    """Say what the pool builds."""
    views = [node.view() for node in nodes]
    native = sorted({item for view in views for item in view.platforms})
    emulated = sorted({item for view in views for item in view.emulated} - set(native))
    text = f"it builds {_list(native)}"
    return f"{text}, and {_list(emulated)} by emulation" if emulated else text


def _list(items: Sequence[str], word: str = "and") -> str:
    *first, last = items or ["nothing"]
    return f"{', '.join(first)} {word} {last}" if first else last

"""What all connections of BuildKit clients at one node share."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from offload_builder.buildkit.h2.limits import Budget
from offload_builder.buildkit.introduction import introduce
from offload_builder.node.proxy.names import Names
from offload_builder.node.steplimits import StepBounds
from offload_core.errors import AccessDeniedError

if TYPE_CHECKING:
    from offload_builder.buildkit.introduction import Introduction
    from offload_builder.node.agent import NodeAgent
    from offload_builder.node.project import ProjectRuntime
    from offload_builder.node.proxy.admission import GatewayDesk, Guest

MAX_REFS = 4096
MAX_REQUEST_BYTES = 1 << 30
"""Of all connections, for requests that come or wait."""


class Desk:
    """The node, the gateway, and what is known of daemons and builds.

    Attributes:
        build_names: of builds that wait or run.
        requests: bytes of requests that are held.
        session_names: of sessions that are open.

    Args:
        agent: of the node.
        gateway: what is asked there.
    """

    def __init__(self, agent: NodeAgent, gateway: GatewayDesk) -> None:
        self.agent = agent
        self.gateway = gateway
        self.bounds = StepBounds.of(agent.config)
        self._introductions: dict[tuple[str, str], Introduction] = {}
        self._asking = asyncio.Lock()
        self.requests = Budget(MAX_REQUEST_BYTES)
        self.build_names = Names("build")
        self.session_names = Names("session")
        self._repeats: OrderedDict[str, str] = OrderedDict()
        self._refs: OrderedDict[str, tuple[str, str]] = OrderedDict()

    async def runtime(self, guest: Guest) -> ProjectRuntime:
        """Return the trust domain of a member in a project.

        Raises:
            OffloadError: it cannot be opened.
        """
        return await self.agent.runtime(guest.project_id, guest.trust_domain)

    async def introduction(self, guest: Guest) -> Introduction:
        """Return what the project's BuildKit says of itself; it is asked once.

        Raises:
            OffloadError: it cannot be started.
        """
        key = (guest.project_id, guest.trust_domain)
        found = self._introductions.get(key)
        if found is None:
            async with self._asking:
                found = self._introductions.get(key)
                if found is None:
                    runtime = await self.runtime(guest)
                    async with runtime.use() as client:
                        found = await introduce(client.socket_path)
                    self._introductions[key] = found
        return found

    def capabilities(self) -> list[str]:
        """Return the secrets that no client may see."""
        return self.agent.registry.capabilities()

    def note_ref(self, guest: Guest, ref: str) -> None:
        """Remember whose build a name stands for.

        Raises:
            AccessDeniedError: it stands for a build of somebody else.
        """
        owner = (guest.project_id, guest.member)
        if self._refs.get(ref, owner) != owner:
            raise AccessDeniedError(f"the name {ref} belongs to a build of another member")
        self._refs[ref] = owner
        if len(self._refs) > MAX_REFS:
            self._refs.popitem(last=False)

    def note_repeat(self, ref: str, repeated: str) -> None:
        """Remember under which name BuildKit has repeated a client's build."""
        self._repeats[ref] = repeated
        if len(self._repeats) > MAX_REFS:
            self._repeats.popitem(last=False)

    def repeats(self) -> dict[str, str]:
        """Return BuildKit's names of builds that were repeated, by the clients' names."""
        return dict(self._repeats)

    def refs_of(self, guest: Guest) -> list[str]:
        """Return the names of a member's builds at this node."""
        whose = (guest.project_id, guest.member)
        return [ref for ref, owner in self._refs.items() if owner == whose]

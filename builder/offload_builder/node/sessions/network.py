"""The networks of sessions' engines: behind the node's firewall, as builds are."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from offload_builder.egress.firewall.projectnet import Interior, engine_table
from offload_builder.egress.policy.connections import allows_urls, without_urls
from offload_builder.egress.policy.model import EffectivePolicy
from offload_builder.node.firewalledplaces import PlaceRules
from offload_core.errors import ConfigError, NotFoundError, QuotaExceededError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from offload_builder.egress.firewall.projectnet import ProjectNetwork
    from offload_builder.node.egresstold import Told
    from offload_builder.node.isolation import Isolation
    from offload_cache.registry.server import RegistryServer

log = structlog.get_logger(__name__)

_MAX_REFUSED = 50
NOT_BEHIND = (
    "this node takes no sessions: what runs here is not behind a firewall (isolation is none)"
)


@dataclass(eq=False)
class EngineNetwork:
    """The network of one engine, while it is attached.

    Attributes:
        namespace: path of the network namespace.
        dns: address of the name server for it.
        mtu: of its device, in bytes.
        ipv6: there is a way out for IPv6.
        registry: HOST:PORT of the node's registry, for the engine itself.
        project_id: whose it is; empty before `SessionNetworks.assign`.
        refused: what was not reached lately and why, one sentence each.
    """

    namespace: Path
    dns: str
    mtu: int
    ipv6: bool
    registry: str
    project_id: str = ""
    refused: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_REFUSED))


@dataclass(eq=False)
class _Attached:
    network: EngineNetwork
    stack: AsyncExitStack
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class SessionNetworks:
    """Gives engines their networks.

    Args:
        isolation: of the node, open already.
        registry: the node's, which each engine reaches at an address of its own.
    """

    def __init__(self, isolation: Isolation, registry: RegistryServer) -> None:
        self._isolation = isolation
        self._registry = registry
        self._attached: dict[str, _Attached] = {}
        isolation.told.listeners.append(self._hear)

    def why_impossible(self) -> str:
        """Return why this node can take no sessions; empty when it can."""
        return NOT_BEHIND if self._isolation.places is None else self._isolation.why_refused()

    @asynccontextmanager
    async def attach(self, key: str, users: Path | None = None) -> AsyncIterator[EngineNetwork]:
        """Make a network from which nothing can be reached yet, while the context is open.

        Args:
            key: names it.
            users: path of the user namespace whose root may set it up; None for this process's.

        Raises:
            ConfigError: the machine does not allow it.
            QuotaExceededError: the node has no room for more.
            InternalError: nftables refused the rules.
        """
        places = self._isolation.places
        if places is None:
            raise ConfigError(NOT_BEHIND, hint="set isolation = netns for this node")
        if key in self._attached:
            raise QuotaExceededError(f"the engine {key} has a network already")
        place = _place(key)
        async with AsyncExitStack() as stack:
            interior = Interior(engine_table, users)
            inner = await stack.enter_async_context(places.attach(place, interior))
            listener = await places.firewall.open_registry(place)
            registry = await stack.enter_async_context(self._registry.at(listener))
            # Left before the network is: it needs what the place has.
            assigned = await stack.enter_async_context(AsyncExitStack())
            network = _network(inner, registry)
            self._attached[key] = _Attached(network, assigned)
            stack.callback(self._attached.pop, key, None)
            yield network

    async def assign(self, key: str, project_id: str) -> None:
        """Let it reach what the policy of a project allows, now and whenever that changes.

        Rules by URL are for builds: nobody looks at the URLs of a session, so the servers that
        only such rules allow cannot be reached from it.

        Raises:
            NotFoundError: it is not attached.
            QuotaExceededError: it has another project already.
            OffloadError: it cannot be done; nothing can be reached.
        """
        found = self._attached.get(key)
        places = self._isolation.places
        if found is None or places is None:
            raise NotFoundError(f"the engine {key} has no network at this node")
        async with found.turn:
            if found.network.project_id == project_id:
                return
            if found.network.project_id:
                raise QuotaExceededError(f"the network of the engine {key} has a project already")
            place = _place(key)
            if allows_urls(self._isolation.policy_of(project_id).base):
                log.warning("session.policy.urls_left_out", engine_id=key, project_id=project_id)
            async with AsyncExitStack() as stack:
                rules = PlaceRules(project_id, lambda: self._policy(project_id), runs_on=True)
                await stack.enter_async_context(places.obeying(place, rules))
                await self._isolation.settled(place)
                found.stack.push_async_callback(stack.pop_all().aclose)
            found.network.project_id = project_id

    def registry_of(self, key: str) -> str:
        """Return HOST:PORT of the node's registry as an engine reaches it.

        Raises:
            NotFoundError: it is not attached.
        """
        found = self._attached.get(key)
        if found is None:
            raise NotFoundError(f"the engine {key} has no network at this node")
        return found.network.registry

    def _policy(self, project_id: str) -> EffectivePolicy:
        return EffectivePolicy(without_urls(self._isolation.policy_of(project_id).base))

    def _hear(self, told: Told) -> None:
        if told.verdict.allowed or not told.place.startswith(_PREFIX):
            return
        found = self._attached.get(told.place.removeprefix(_PREFIX))
        if found is not None:
            found.network.refused.append(f"{told}: {told.verdict.reason}")


_PREFIX = "~session-"


def _place(key: str) -> str:
    """Return the name of a place, which no project's has: their names do not begin with ~."""
    return _PREFIX + key


def _network(inner: ProjectNetwork, registry: str) -> EngineNetwork:
    addresses = inner.addresses
    return EngineNetwork(inner.namespace, addresses.gateway_v4, inner.mtu, inner.ipv6, registry)

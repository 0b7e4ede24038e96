"""Places behind the node's firewall: each reaches what the policy of its project allows."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.egress.connectors.doors import ConnectorDoors
from offload_builder.egress.firewall.projectnet import STEPS
from offload_builder.egress.policy.model import (
    EffectivePolicy,
    Policy,
    Posture,
    ProtectedRange,
)
from offload_builder.egress.resolver.metrics import ResolverMetrics
from offload_builder.egress.resolver.service import ResolverService, ResolverSettings
from offload_core.errors import InternalError, NotFoundError, OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from prometheus_client import CollectorRegistry

    from offload_builder.egress.connectors.tunnels import Arrival, Tunnels
    from offload_builder.egress.firewall.lifecycle import EgressFirewall
    from offload_builder.egress.firewall.projectnet import Interior, ProjectNetwork
    from offload_builder.egress.resolver.upstreams import Server
    from offload_builder.node.egresstold import EgressTold
    from offload_builder.node.nodemetrics import EgressCounts

_log = structlog.get_logger(__name__)

_NOTHING = EffectivePolicy(Policy(posture=Posture.ALLOWLIST, source="a place without rules yet"))


@dataclass(frozen=True, slots=True)
class PlaceRules:
    """What a place obeys.

    Attributes:
        project_id: whose it is.
        policy: returns what holds there now.
        before: called before a new policy is in force.
        after: called when it is.
        runs_on: what is in the place goes on whatever happens, and nobody asks whether the newest
            policy is in force: while it cannot be, nothing is reached.
    """

    project_id: str
    policy: Callable[[], EffectivePolicy]
    before: Callable[[EffectivePolicy], None] = lambda _: None
    after: Callable[[EffectivePolicy], None] = lambda _: None
    runs_on: bool = False


class FirewalledPlaces:
    """All of a node; an async context manager.

    Args:
        firewall: open already.
        told: hears of everything that places reach or do not reach.
        counts: of new connections, by project.
        tunnels: carry what connectors serve.
        servers: that names are asked of; those of the machine when there are none.
        metrics: take those of the resolver.

    Attributes:
        guarded: addresses of the node itself, which no name may lead to.
    """

    def __init__(
        self,
        firewall: EgressFirewall,
        told: EgressTold,
        counts: EgressCounts,
        tunnels: Tunnels,
        *,
        servers: tuple[Server, ...],
        metrics: CollectorRegistry,
    ) -> None:
        self.firewall = firewall
        self.guarded = tuple(
            ProtectedRange("node", ip_network(address), "the node itself", openable=False)
            for address in firewall.router.node_addresses
        )
        self._told = told
        self._counts = counts
        self._tunnels = tunnels
        self._resolver = ResolverService(
            ResolverSettings(servers=servers, guarded=self.guarded),
            book=firewall,
            listener=told,
            connected=told.connected.of,
            metrics=ResolverMetrics(metrics),
        )
        self.doors = ConnectorDoors(
            firewall, told.connected, self._policy_at, tunnels.carry, self.uncarried
        )
        self._changing = asyncio.Lock()
        self._rules: dict[str, PlaceRules] = {}
        self._closed: set[str] = set()
        self._cut: set[str] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._resolver)
            await stack.enter_async_context(self._tunnels)
            await stack.enter_async_context(self.doors)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def keys(self) -> list[str]:
        """The places that obey a project's policy now."""
        return list(self._rules)

    @asynccontextmanager
    async def attach(self, key: str, interior: Interior = STEPS) -> AsyncIterator[ProjectNetwork]:
        """Make a place while the context is open; nothing can be reached from it yet.

        Args:
            key: names it; no two places have the same.
            interior: what will be in it.

        Raises:
            QuotaExceededError: the node has no room for more places.
            ConfigError: the machine does not allow it.
            InternalError: nftables refused the rules.
        """
        async with AsyncExitStack() as stack:
            async with self._changing:
                stack.callback(self._told.forget, key)
                attaching = self.firewall.attach(key, _NOTHING, interior)
                network = await stack.enter_async_context(attaching)
                router, gateways = self.firewall.router, [network.addresses.gateway_v4]
                await stack.enter_async_context(
                    self._resolver.serving(key, router.inside, gateways, _NOTHING)
                )
                self._closed.add(key)
                stack.callback(self._closed.discard, key)
                stack.callback(self._cut.discard, key)
            yield network

    @asynccontextmanager
    async def obeying(self, key: str, rules: PlaceRules) -> AsyncIterator[None]:
        """Say what a place obeys while the context is open; `open` puts it in force.

        Raises:
            InternalError: that was said already.
        """
        if key in self._rules:
            raise InternalError(f"the place {key} has a project already")
        async with AsyncExitStack() as stack:
            self._counts.opened(key, rules.project_id)
            stack.push_async_callback(self._stop_counting, key)
            self._rules[key] = rules
            stack.callback(self._rules.pop, key, None)
            await stack.enter_async_context(self.doors.serving(key, rules.project_id))
            yield

    async def _stop_counting(self, key: str) -> None:
        try:
            await self._counts.closing(key)
        except OffloadError as error:
            _log.warning("egress.counts.lost", place=key, error=error.message)

    async def open(self, key: str) -> None:
        """Put a place that is closed yet under the rules that hold for it.

        Raises:
            OffloadError: it cannot be done; nothing can be reached.
        """
        async with self._changing:
            if key in self._closed:
                await self._enforce(key)

    async def enforce(self, key: str) -> None:
        """Have a place obey what holds now, unless it is gone.

        Raises:
            OffloadError: it cannot be done; what held before does.
        """
        async with self._changing:
            await self._enforce(key)
            await self.doors.refresh()

    async def enforce_all(self) -> None:
        """Have all places obey what holds now.

        Raises:
            OffloadError: some cannot; what held before does there, or nothing can be reached.
        """
        failure: OffloadError | None = None
        async with self._changing:
            for key in list(self._rules):
                try:
                    await self._enforce(key)
                except OffloadError as error:
                    # It is no reason for the others to go on under what held before.
                    _log.error("egress.place.not_enforced", place=key, error=error.message)
                    failure = error
                    await self._shut(key)
            await self.doors.refresh()
        if failure is not None:
            raise failure

    async def _enforce(self, key: str) -> None:
        rules = self._rules.get(key)
        if rules is None:
            return
        policy = rules.policy()
        rules.before(policy)
        await self._apply(key, policy)
        rules.after(policy)
        if key in self._cut:
            self._cut.discard(key)
            try:
                await self.firewall.mend(key)
            except OffloadError as error:
                # Who owns the namespace can take its device away, from nobody but themselves.
                _log.warning("egress.place.not_mended", place=key, error=error.message)
        self._closed.discard(key)

    async def _apply(self, key: str, policy: EffectivePolicy) -> None:
        # Names are judged by the new policy first: nothing of the old one is admitted after the
        # firewall has forgotten it.
        admissions = self._resolver.replace_policy(key, policy)
        await self.firewall.apply(key, policy, admissions)

    async def _shut(self, key: str) -> None:
        """Let nothing be reached from a place that would go on under what held before."""
        rules = self._rules.get(key)
        if rules is None or not rules.runs_on or key in self._closed:
            return
        try:
            # A few rules may be taken where ten thousand were refused.
            await self._apply(key, _NOTHING)
        except OffloadError as error:
            _log.error("egress.place.not_shut", place=key, error=error.message)
            self._cut.add(key)
            try:
                await self.firewall.cut(key)
            except OffloadError as cause:
                # There is no device any more, or the next attempt cuts it off.
                _log.error("egress.place.not_cut", place=key, error=cause.message)
                return
        self._closed.add(key)

    def _policy_at(self, key: str) -> EffectivePolicy:
        """Return what holds now at a place."""
        return self._rules[key].policy()

    def uncarried(self, arrival: Arrival, reason: str) -> None:
        """Hear of a connection that connectors did not carry."""
        try:
            # The one that the firewall has: what was sorted for it is not sorted again for each.
            policy = self.firewall.policy(arrival.place)
        except NotFoundError:
            # The place has gone meanwhile, and with it who would hear of this.
            return
        self._told.uncarried(arrival, policy, reason)

"""Where the BuildKit of a project is in the network: behind the firewall, or on the machine."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Self

import structlog
from prometheus_client import CollectorRegistry

from offload_builder.egress.connectors.tunnels import Tunnels
from offload_builder.egress.firewall.daemonnet import (
    prepare_daemon,
)
from offload_builder.egress.firewall.lifecycle import EgressFirewall
from offload_builder.egress.firewall.router import OUR_NAMESPACE
from offload_builder.egress.policy.connections import allows_urls
from offload_builder.egress.policy.merging import narrow
from offload_builder.egress.policy.model import EffectivePolicy, ProtectedRange
from offload_builder.egress.resolver.upstreams import parse_server
from offload_builder.egress.urls.locations import image_at
from offload_builder.egress.urls.routeguard import RouteGuard
from offload_builder.egress.urls.urlpolicy import OwnPlace, UrlPolicy
from offload_builder.node.egressdesk import EgressDesk
from offload_builder.node.egresstold import EgressTold, Told
from offload_builder.node.firewalledplaces import FirewalledPlaces, PlaceRules
from offload_builder.node.isolationmode import wanted
from offload_builder.node.nodemetrics import EgressCounts
from offload_builder.node.place import Place
from offload_builder.node.registryaccess import RegistryJudge
from offload_builder.node.registryrules import local_registries, registry_rules
from offload_core.aio import TaskSet
from offload_core.errors import ConfigError, NodeLostError, OffloadError
from offload_core.trust import split_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from offload_builder.buildkit.daemon_config import RegistrySettings
    from offload_builder.egress.connectors.tunnels import Arrival
    from offload_builder.egress.firewall.ruleset import Stage
    from offload_builder.egress.held import Held, HeldPolicies
    from offload_builder.egress.policy.model import Policy
    from offload_builder.egress.policy.ofbuild import BuildPolicy
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.trustdomain import TrustDomain
    from offload_cache.registry.server import RegistryServer
    from offload_proto.v1.nodes_service_pb2 import AttachRequest, AttachResponse

_log = structlog.get_logger(__name__)

SETTLE_SECONDS = 15.0
"""Ten thousand rules take less than one to read and to apply."""
RETRY_SECONDS = 2.0
NOT_NARROWED = (
    "this node cannot enforce the build's --network-policy: its builds are not behind a firewall "
    "(isolation is none)"
)


class Isolation:
    """Gives each trust domain its place; an async context manager.

    Args:
        config: of the node.
        registry: the node's, which each place reaches at an address of its own.
        policies: what the gateway said.
        registries: of the node's configuration; all builds may reach them.
        send: sends a message to the gateway; False when it does not answer.

    Attributes:
        told: hears of everything that builds reach or do not reach.
        metrics: of this node only, as a process may have several.
    """

    def __init__(
        self,
        config: NodeConfig,
        registry: RegistryServer,
        policies: HeldPolicies,
        registries: Mapping[str, RegistrySettings] | None = None,
        send: Callable[[AttachRequest], bool] = lambda _: False,
    ) -> None:
        self._config = config
        self._registry = registry
        self._policies = policies
        self._rules = registry_rules(config.registry_config, registries or {})
        self._servers = tuple(parse_server(text) for text in config.dns_servers)
        self._desks: dict[str, EgressDesk] = {}
        self._urls: dict[str, tuple[Policy, UrlPolicy]] = {}
        self._stack = AsyncExitStack()
        self.told = EgressTold()
        self.told.listeners.append(self._hear)
        self.metrics = CollectorRegistry()
        self.counts = EgressCounts(self._count)
        self.metrics.register(self.counts)
        self.tunnels = Tunnels(send, self._uncarried)
        self.firewall: EgressFirewall | None = None
        """None where builds are on the machine's own network."""
        self.places: FirewalledPlaces | None = None
        """Those behind the firewall; None without one."""

    async def __aenter__(self) -> Self:
        """Open the firewall where builds are behind it.

        Raises:
            ConfigError: they have to be, and this machine cannot do it.
            InternalError: nftables refused the rules.
        """
        must = self._policies.held.says_something
        async with AsyncExitStack() as stack:
            if wanted(self._config, must=must):
                firewall = EgressFirewall(
                    self._config.data, self.told.connection, outside=OUR_NAMESPACE
                )
                try:
                    self.firewall = await stack.enter_async_context(firewall)
                except OffloadError as error:
                    if must or self._config.isolation != "auto":
                        raise
                    _log.warning("egress.isolation.off", reason=error.message)
                else:
                    places = FirewalledPlaces(
                        firewall,
                        self.told,
                        self.counts,
                        self.tunnels,
                        servers=self._servers,
                        metrics=self.metrics,
                    )
                    self.places = await stack.enter_async_context(places)
            self._policies.on_change(self._policies_changed)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def take_served(self, message: AttachResponse) -> None:
        """Hear from the gateway what connectors serve."""
        if self.places is not None:
            self.places.doors.take_message(message)

    def _uncarried(self, arrival: Arrival, reason: str) -> None:
        if self.places is not None:
            self.places.uncarried(arrival, reason)

    def _hear(self, told: Told) -> None:
        if (desk := self._desks.get(told.place)) is not None:
            desk.hear(told)

    async def _count(self) -> dict[str, dict[Stage, int]]:
        return {} if self.firewall is None else await self.firewall.counts()

    def why_refused(self) -> str:
        """Return why this node takes no builds; empty when it does."""
        if self.firewall is None and self._policies.held.says_something:
            return "the node cannot enforce the pool's egress policy (isolation is none)"
        return ""

    def policy_of(self, project_id: str, narrowed: BuildPolicy | None = None) -> EffectivePolicy:
        """Return what holds now for a project, and for builds of it that bring a policy."""
        base = self._policies.of_project(project_id).with_rules(self._rules)
        return narrow(base, narrowed.policy) if narrowed is not None else EffectivePolicy(base)

    @property
    def _guarded(self) -> tuple[ProtectedRange, ...]:
        return () if self.places is None else self.places.guarded

    def judge(
        self, project_id: str, narrowed: BuildPolicy | None = None, *, place: str = ""
    ) -> RegistryJudge | None:
        """Return what judges how the node itself reaches registries for builds.

        None where nothing is enforced for them: there is no firewall, no policy, and none that the
        builds have brought.

        Args:
            project_id: of the builds.
            narrowed: the policy that they have brought.
            place: whose builds hear of refusals while they run; empty for none.
        """
        if self.firewall is None and narrowed is None and not self._policies.held.says_something:
            return None
        known: list[tuple[Policy, UrlPolicy]] = []

        def policy() -> UrlPolicy:
            base = self._policies.of_project(project_id)
            if not known or known[0][0] is not base:
                whole = self.policy_of(project_id, narrowed)
                known[:] = [(base, UrlPolicy(whole, guarded=self._guarded))]
            return known[0][1]

        tell = partial(self.told.of_node, place)
        local = local_registries(self._rules) if narrowed is None else frozenset()
        return RegistryJudge(policy, tell, local)

    @asynccontextmanager
    async def place(self, domain: TrustDomain) -> AsyncIterator[Place]:
        """Give a trust domain its place while the context is open.

        Raises:
            ConfigError: there is a policy, of the pool or of the build, and builds here would be
                on the machine's network.
            OffloadError: it cannot be had.
        """
        if reason := self.why_refused():
            raise ConfigError(reason)
        places = self.places
        if places is None:
            if domain.narrowed is not None:
                raise ConfigError(NOT_NARROWED)
            yield Place(self._registry.address)
            return
        root = domain.folder(self._config) / "buildkit"
        guard = RouteGuard(domain.folder(self._config) / "proxied-only")
        key = domain.folder(self._config).name
        async with AsyncExitStack() as stack:
            guard.set(closed=True)
            stack.callback(self._urls.pop, key, None)
            network = await stack.enter_async_context(places.attach(key))
            await stack.enter_async_context(places.obeying(key, self._rules_of(domain, guard)))
            listener = await places.firewall.open_registry(key)
            address = await stack.enter_async_context(self._registry.at(listener))
            host, port = split_address(address)
            own = (OwnPlace(host, port),)
            urls = partial(self._urls_of, key, domain, own)
            desk = await stack.enter_async_context(
                EgressDesk(lambda: self.policy_of(domain.project_id).base)
            )
            tasks = TaskSet(_crashed)
            stack.push_async_callback(tasks.close)
            # While BuildKit starts: ten thousand rules take as long as that.
            tasks.start(places.open(key), name="egress.open")
            if domain.narrowed is not None:
                tasks.start(self._follow(places, key, domain.narrowed), name="egress.expiry")
            self._desks[key] = desk
            stack.callback(self._desks.pop, key, None)
            daemon = prepare_daemon(root, network)
            connected = partial(_connected, urls)
            judge = self.judge(domain.project_id, domain.narrowed, place=key)
            settled = partial(self.settled, key)
            yield Place(address, daemon, settled, urls, desk, guard, connected, judge)

    def _rules_of(self, domain: TrustDomain, guard: RouteGuard) -> PlaceRules:
        def before(policy: EffectivePolicy) -> None:
            if allows_urls(policy.base):
                # Before the servers of URLs are open, and until they are shut again.
                guard.set(closed=True)

        return PlaceRules(
            domain.project_id,
            lambda: self.policy_of(domain.project_id, domain.narrowed),
            before,
            lambda policy: guard.set(closed=allows_urls(policy.base)),
        )

    @staticmethod
    async def _follow(places: FirewalledPlaces, key: str, narrowed: BuildPolicy) -> None:
        """Enforce the policy of builds anew whenever one of its rules ends."""
        while (end := narrowed.policy.next_change()) is not None:
            await asyncio.sleep((end - datetime.now(UTC)).total_seconds() + 0.001)
            while True:
                try:
                    await places.enforce(key)
                    break
                except OffloadError as error:
                    _log.error("egress.expiry.not_enforced", place=key, error=error.message)
                await asyncio.sleep(RETRY_SECONDS)

    def _urls_of(
        self, key: str, domain: TrustDomain, own: tuple[OwnPlace, ...]
    ) -> UrlPolicy | None:
        """Return the rules for sources of a place, made once for each policy.

        They name what is refused before any step runs. Base images need them: the node's mirror
        fetches these itself, outside of the firewall.
        """
        if domain.narrowed is None and not self._policies.held.says_something:
            return None
        base = self._policies.of_project(domain.project_id)
        known = self._urls.get(key)
        if known is None or known[0] is not base:
            whole = self.policy_of(domain.project_id, domain.narrowed)
            policy = UrlPolicy(whole, own=own, guarded=self._guarded, proxied=base.proxied)
            known = self._urls[key] = (base, policy)
        return known[1]

    async def settled(self, key: str) -> None:
        """Wait until the newest policy holds at a place.

        Raises:
            NodeLostError: it does not within `SETTLE_SECONDS`.
            OffloadError: it cannot be enforced.
        """
        if self.places is None:
            return
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await self.places.open(key)
                await self._policies.settled()
        except TimeoutError as error:
            raise NodeLostError(
                "the node could not enforce the newest egress policy; its log says why"
            ) from error

    async def _policies_changed(self, _: Held) -> None:
        """Have all places obey what the gateway said; whoever says so repeats it if this fails."""
        if reason := self.why_refused():
            _log.error("egress.policy.unenforced", reason=reason)
        if self.places is not None:
            await self.places.enforce_all()


def _crashed(name: str, error: BaseException) -> None:
    # Builds try again before they begin, and end with the reason.
    _log.error("egress.place.failed", task=name, exc_info=error)


def _connected(urls: Callable[[], UrlPolicy | None], host: str) -> bool:
    policy = urls()
    if policy is None:
        return False
    return policy.connected(image_at(host, "image").host)

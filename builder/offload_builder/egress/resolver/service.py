"""The resolver of a node: all its projects."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.egress.resolver.dnssockets import open_dns_sockets
from offload_builder.egress.resolver.listening import Listeners
from offload_builder.egress.resolver.metrics import ResolverMetrics
from offload_builder.egress.resolver.nameview import NameView
from offload_builder.egress.resolver.projectview import ProjectView, ViewLimits
from offload_builder.egress.resolver.upstream import Asker, Patience
from offload_builder.egress.resolver.upstreams import Upstreams
from offload_core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from offload_builder.egress.firewall.namespaces import NetworkNamespace
    from offload_builder.egress.policy.model import Address, EffectivePolicy, ProtectedRange
    from offload_builder.egress.resolver.contract import (
        AddressBook,
        Admission,
        NameListener,
        ServiceName,
    )
    from offload_builder.egress.resolver.listening import DnsSockets
    from offload_builder.egress.resolver.upstreams import Server

_log = structlog.get_logger(__name__)
RESOLV_CONF = Path("/etc/resolv.conf")


def _no_services(_project: str) -> Iterable[ServiceName]:
    return ()


def _no_connectors(_project: str, name: str) -> Address:
    raise InternalError(f"{name} is reached through a connector, and this node knows none")


@dataclass(frozen=True, slots=True)
class ResolverSettings:
    """How a node resolves names.

    Attributes:
        servers: to ask; none for those of the node's own resolv.conf.
        resolv_conf: that file.
        guarded: protected ranges of this node, beside those that are protected everywhere.
        limits: of each project.
        patience: with servers.
    """

    servers: tuple[Server, ...] = ()
    resolv_conf: Path = RESOLV_CONF
    guarded: tuple[ProtectedRange, ...] = ()
    limits: ViewLimits = field(default_factory=ViewLimits)
    patience: Patience = field(default_factory=Patience)


class ResolverService:
    """Answers the names of a node's projects; `async with`, or `close` at the end.

    Args:
        settings: of the node.
        book: the firewall.
        listener: hears of refusals and answers.
        services: names the hosts that the node's configuration allows a project: the registries of
            the pool with their mirrors, and the storage if BuildKit reads from it directly. Asked
            whenever a project is added or its policy changes.
        connected: returns the address that stands, for a project, for a name of connectors.
        metrics: counters.
    """

    def __init__(
        self,
        settings: ResolverSettings,
        *,
        book: AddressBook,
        listener: NameListener,
        services: Callable[[str], Iterable[ServiceName]] = _no_services,
        connected: Callable[[str, str], Address] = _no_connectors,
        metrics: ResolverMetrics | None = None,
    ) -> None:
        self._settings = settings
        self._book = book
        self._listener = listener
        self._services = services
        self._connected = connected
        self._metrics = metrics or ResolverMetrics()
        upstreams = Upstreams(settings.servers, settings.resolv_conf)
        self._asker = Asker(upstreams, self._metrics, settings.patience)
        self._projects: dict[str, tuple[ProjectView, Listeners]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop answering; names fail from now on."""
        for project in list(self._projects):
            await self.remove(project)

    async def add(self, project: str, sockets: DnsSockets, policy: EffectivePolicy) -> None:
        """Answer a project's queries at sockets that are its own from now on.

        Raises:
            InternalError: the project is there already.
        """
        if project in self._projects:
            sockets.close()
            raise InternalError(f"the names of the project {project} are answered already")
        view = ProjectView(
            project,
            self._names(project, policy),
            book=self._book,
            listener=self._listener,
            asker=self._asker,
            metrics=self._metrics,
            limits=self._settings.limits,
            connected=partial(self._connected, project),
        )
        listeners = Listeners(sockets, view)
        await listeners.__aenter__()
        self._projects[project] = (view, listeners)
        _log.info("dns.project.added", project=project, sockets=len(sockets.udp))

    @asynccontextmanager
    async def serving(
        self,
        project: str,
        space: NetworkNamespace,
        addresses: Sequence[str],
        policy: EffectivePolicy,
    ) -> AsyncIterator[None]:
        """Answer a project's queries while the context is open.

        Args:
            project: as the firewall names it.
            space: of the node's router.
            addresses: the gateway addresses of the project there.
            policy: holds from the beginning.

        Raises:
            InternalError: an address cannot be used, or the project is there already.
        """
        await self.add(project, await open_dns_sockets(space, addresses), policy)
        try:
            yield
        finally:
            await self.remove(project)

    async def remove(self, project: str) -> None:
        """Stop answering a project; nothing happens when it is not there."""
        found = self._projects.pop(project, None)
        if found is None:
            return
        view, listeners = found
        await listeners.close()
        await view.close()
        _log.info("dns.project.removed", project=project)

    def replace_policy(self, project: str, policy: EffectivePolicy) -> list[Admission]:
        """Judge by another policy from now on.

        Returns:
            What the answers that are still good open under it. The firewall empties its list of
            the project and fills it with these in one step, before it takes further admissions.

        Raises:
            InternalError: there is no such project.
        """
        view = self.view(project)
        view.replace_names(self._names(project, policy))
        return view.live_admissions()

    def view(self, project: str) -> ProjectView:
        """Return the view of a project.

        Raises:
            InternalError: there is no such project.
        """
        found = self._projects.get(project)
        if found is None:
            raise InternalError(f"the names of the project {project} are not answered here")
        return found[0]

    def _names(self, project: str, policy: EffectivePolicy) -> NameView:
        return NameView(policy, self._services(project), self._settings.guarded)

"""The projects of a node, with their trust domains, from their first build until they are idle."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import structlog

from offload_builder.node.contextshare import SharingThreads
from offload_builder.node.platformsurvey import PlatformSurvey
from offload_builder.node.project import ProjectRuntime, Surroundings
from offload_builder.node.projectcontent import ProjectContent
from offload_builder.node.trustdomain import (
    TrustDomain,
    delete,
    leftovers,
    project_of,
    set_aside,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from types import TracebackType

    from offload_builder.egress.policy.ofbuild import BuildPolicy
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.contextstore import ContextStore
    from offload_builder.node.place import Place
    from offload_builder.node.registries import Bases
    from offload_cache.mirror.judging import Judge
    from offload_cache.nodestore import NodeStore
    from offload_cache.tiered import ProjectStore

log = structlog.get_logger(__name__)

REAP_SECONDS = 5.0
MAX_RESTING = 4
"""Domains of builds with policies of their own that are kept warm while nobody uses them."""
_LEAST_REST_SECONDS = 10.0
"""Whoever got a domain uses it by then."""
SETTLE_SECONDS = 20.0
"""For cache mounts that wait to be stored when the node stops."""


class _Opened(NamedTuple):
    runtime: ProjectRuntime
    stack: AsyncExitStack
    """Closes it, and what only it uses."""


class ServeBases(Protocol):
    """Gives one BuildKit its way to registries and base images while the context is open."""

    def __call__(
        self,
        address: str,
        store: ProjectStore,
        *,
        trusted: bool,
        elsewhere: Callable[[str], bool],
        judge: Judge | None,
    ) -> AbstractAsyncContextManager[Bases]:
        """Return the context.

        Args:
            address: HOST:PORT of the node's registry, as that BuildKit reaches it.
            store: of the BuildKit's project.
            trusted: its builds may have what the pool's logins can read.
            elsewhere: says of a registry whether only the BuildKit can reach it.
            judge: of what the node itself reaches for them; None for everything.
        """
        ...


class ProjectPool:
    """The projects of a node, opened at their first build.

    Args:
        config: of the node.
        node_store: the node's cache.
        serve_bases: gives a BuildKit its way to registries and base images.
        place: gives a BuildKit its place in the network.
    """

    def __init__(
        self,
        config: NodeConfig,
        node_store: NodeStore,
        serve_bases: ServeBases,
        place: Callable[[TrustDomain], AbstractAsyncContextManager[Place]],
    ) -> None:
        self._config = config
        self._place = place
        self._serve_bases = serve_bases
        self._node_store = node_store
        self._threads = SharingThreads()
        self._packing = asyncio.Semaphore(1)
        self._stack = AsyncExitStack()
        self._narrowing = asyncio.Lock()
        self._opening: dict[str, asyncio.Lock] = {}
        self._opened: dict[TrustDomain, _Opened] = {}
        self._contents: dict[str, ProjectContent] = {}
        self._latest: dict[str, str] = {}
        self.survey = PlatformSurvey(config, self._known_platforms)

    async def _known_platforms(self) -> tuple[str, ...]:
        """Return what a BuildKit that runs can build; empty while none does."""
        for runtime in self.running():
            if found := await runtime.platforms():
                return found
        return ()

    async def __aenter__(self) -> Self:
        self._stack.callback(self._threads.close)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await asyncio.gather(
                *(
                    content.shared.settle()
                    for content in self._contents.values()
                    if content.shared is not None
                ),
                *(
                    runtime.mounts.settle(SETTLE_SECONDS)
                    for runtime in self.running()
                    if runtime.mounts is not None
                ),
            )
        finally:
            for opened in self._opened.values():
                self._stack.push_async_callback(opened.stack.aclose)
            await self._stack.aclose()

    def _busy(self) -> bool:
        return any(opened.runtime.busy for opened in self._opened.values())

    async def runtime(
        self, project_id: str, domain_name: str = "", narrowed: BuildPolicy | None = None
    ) -> ProjectRuntime:
        """Return a trust domain of a project, opened now or before.

        Args:
            project_id: the project.
            domain_name: as the gateway says it.
            narrowed: the policy that a build brings. Of the domains that are idle, another one
                may have to go first.

        Raises:
            UsageError: the name is no project name, or the domain is not known.
            ConfigError: it cannot be kept from reaching what its policies forbid.
            OffloadError: its data cannot be opened.
        """
        domain = TrustDomain(project_id, domain_name, narrowed)
        if narrowed is not None:
            return await self._narrowed_runtime(domain)
        self._latest[project_id] = domain_name
        return await self._runtime(domain)

    async def _runtime(self, domain: TrustDomain) -> ProjectRuntime:
        async with self._lock(domain.project_id):
            opened = self._opened.get(domain)
            if opened is None:
                opened = self._opened[domain] = await self._open(domain)
            opened.runtime.touch()
            return opened.runtime

    async def _narrowed_runtime(self, domain: TrustDomain) -> ProjectRuntime:
        """Open a domain of builds with a policy; as anybody can make up any number, one by one."""
        if domain in self._opened:
            return await self._runtime(domain)
        async with self._narrowing:
            while domain not in self._opened and len(resting := self._resting()) >= MAX_RESTING:
                oldest = max(resting, key=lambda runtime: runtime.idle_seconds)
                wait = _LEAST_REST_SECONDS - oldest.idle_seconds
                if wait > 0:
                    await asyncio.sleep(min(wait, 1.0))
                    continue
                try:
                    await self._remove(oldest.domain, _LEAST_REST_SECONDS)
                except Exception as error:
                    log.error("project.rest.failed", project_id=domain.project_id, exc_info=error)
            return await self._runtime(domain)

    def _resting(self) -> list[ProjectRuntime]:
        return [item for item in self.running() if item.domain.narrowed and not item.busy]

    def _lock(self, project_id: str) -> asyncio.Lock:
        """Return what one holds who opens or removes domains of a project.

        To remove one takes seconds: builds of other projects do not wait for that.
        """
        return self._opening.setdefault(project_id, asyncio.Lock())

    async def likely_runtime(self, project_id: str) -> ProjectRuntime:
        """Return the domain that a build of a project will probably use: that of the last one.

        Raises:
            UsageError: the name is no project name.
            OffloadError: its data cannot be opened.
        """
        return await self.runtime(project_id, self._latest.get(project_id, ""))

    async def _open(self, domain: TrustDomain) -> _Opened:
        cache = await self._node_store.project(domain.project_id)
        async with AsyncExitStack() as stack:
            if domain.is_untrusted:
                content = await stack.enter_async_context(self._content(domain))
            else:
                content = await self._shared_content(domain.project_id)
            place = await stack.enter_async_context(self._place(domain))
            bases = await stack.enter_async_context(
                self._serve_bases(
                    place.registry_address,
                    cache.store,
                    trusted=not domain.is_untrusted,
                    elsewhere=place.connected,
                    judge=place.judge,
                )
            )
            surroundings = Surroundings(self._node_store, bases, place, self._packing)
            runtime = await stack.enter_async_context(
                ProjectRuntime(domain, cache, content, self._config, surroundings)
            )
            return _Opened(runtime, stack.pop_all())

    def _content(self, domain: TrustDomain) -> ProjectContent:
        objects = self._node_store.objects
        return ProjectContent(domain, self._config, objects, self._threads, self._busy)

    async def context_store(self, project_id: str, trust_domain: str) -> ContextStore | None:
        """Return the context files that people of a trust domain share; None for those alone.

        Raises:
            UsageError: the name is no project name.
            OffloadError: its data cannot be opened.
        """
        domain = TrustDomain(project_id, trust_domain)
        if domain.is_untrusted:
            return None
        async with self._lock(project_id):
            return (await self._shared_content(project_id)).store

    async def _shared_content(self, project_id: str) -> ProjectContent:
        content = self._contents.get(project_id)
        if content is None:
            content = self._content(TrustDomain(project_id))
            await self._stack.enter_async_context(content)
            self._contents[project_id] = content
        return content

    def running(self) -> list[ProjectRuntime]:
        """Return the domains of projects that are open."""
        return [opened.runtime for opened in self._opened.values()]

    def daemons(self) -> int:
        """Return how many BuildKits run."""
        return sum(runtime.socket is not None for runtime in self.running())

    async def reap(self) -> None:
        """Stop idle BuildKits and remove what passing domains have left, until cancelled."""
        try:
            await self._remove_leftovers()
        except Exception as error:
            log.error("project.leftovers.failed", exc_info=error)
        while True:
            await asyncio.sleep(REAP_SECONDS)
            for runtime in self.running():
                try:
                    await runtime.rest()
                    await self._remove_if_idle(runtime)
                except Exception as error:
                    log.error("project.rest.failed", project_id=runtime.project_id, exc_info=error)

    async def _remove_if_idle(self, runtime: ProjectRuntime) -> None:
        domain, limit = runtime.domain, self._config.untrusted_idle
        if domain.is_passing and runtime.idle_seconds > limit:
            await self._remove(domain, limit)

    async def _remove(self, domain: TrustDomain, limit: float) -> None:
        """Remove a domain, unless a build has used it in the last so many seconds."""
        async with self._lock(domain.project_id):
            opened = self._opened.get(domain)
            # A build may have asked for it while the lock was awaited.
            if opened is None or opened.runtime.idle_seconds <= limit:
                return
            del self._opened[domain]
            await opened.stack.aclose()
            aside = await set_aside(domain.folder(self._config))
        if aside is not None:
            await delete(aside)
            log.info(
                "domain.removed",
                project_id=domain.project_id,
                trust_domain=domain.name,
                narrowed=domain.narrowed is not None,
            )

    async def _remove_leftovers(self) -> None:
        folders, removed = leftovers(self._config)
        for folder in folders:
            async with self._lock(project_of(folder)):
                if folder in self._folders() or not folder.exists():
                    continue
                aside = await set_aside(folder)
            if aside is not None:
                removed.append(aside)
        for folder in removed:
            await delete(folder)

    def _folders(self) -> set[Path]:
        return {domain.folder(self._config) for domain in self._opened}

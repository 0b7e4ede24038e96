"""The registries that an administrator set up, and how this node's BuildKits reach them."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_builder.buildkit.daemon_config import RegistrySettings
from offload_builder.node.poollogins import PoolLogins
from offload_builder.node.registryfile import RegistryEntry, read_registries
from offload_cache.mirror.connection import Endpoint, new_session
from offload_cache.mirror.handlers import Mirrors
from offload_cache.mirror.images import BasePolicy
from offload_cache.mirror.upstream import DOCKER_HUB, RegistrySource, origin_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    import aiohttp

    from offload_builder.node.config import NodeConfig
    from offload_builder.node.registryfile import PoolLogin
    from offload_cache.database import CacheDatabase
    from offload_cache.mirror.images import BaseImages
    from offload_cache.mirror.judging import Judge
    from offload_cache.mirror.logins import LoginSource
    from offload_cache.tiered import ProjectStore

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Bases:
    """What one BuildKit gets.

    Attributes:
        registries: how it reaches them.
        images: the project's base images; None when none are cached.
        logins: the pool's, for its builds; None where the agent itself asks no registry.
        withheld: variables with passwords, of which it must not know.
    """

    registries: Mapping[str, RegistrySettings]
    images: BaseImages | None
    logins: PoolLogins | None = None
    withheld: frozenset[str] = frozenset()


class Registries:
    """All configured registries, by host as image names begin.

    Raises:
        ConfigError: the file cannot be read, or has a wrong key or value.
    """

    def __init__(self, path: Path | None) -> None:
        self._entries = read_registries(path) if path is not None else {}

    @property
    def settings(self) -> dict[str, RegistrySettings]:
        """Return what BuildKit is told where no base images are cached."""
        return {host: entry.settings for host, entry in self._entries.items()}

    @property
    def withheld(self) -> frozenset[str]:
        """Return the variables that hold passwords."""
        logins = [login for entry in self._entries.values() for login in entry.logins]
        return frozenset(filter(None, (login.source.password_env for login in logins)))

    def sources(self, project_id: str) -> list[RegistrySource]:
        """Return the registries whose images are cached: the configured ones and Docker Hub.

        Args:
            project_id: whose logins are used.
        """
        entries = {DOCKER_HUB: RegistryEntry(), **self._entries}
        return [
            RegistrySource(
                host,
                [
                    *(self._endpoint(mirror, project_id) for mirror in entry.settings.mirrors),
                    (
                        _endpoint(origin_address(host), entry.settings),
                        [login.source for login in entry.logins_of(project_id)],
                    ),
                ],
            )
            for host, entry in entries.items()
            if entry.base_images
        ]

    def _serves(self, host: str, project_id: str) -> bool:
        """Whether a project may have what is read at a registry and at its mirrors."""
        own = self._entries.get(host, RegistryEntry())
        entries = (own, *(self._entry(mirror) for mirror in own.settings.mirrors))
        return all(entry is None or entry.serves(project_id) for entry in entries)

    def _has_login(self, host: str, project_id: str) -> bool:
        own = self._entries.get(host, RegistryEntry())
        entries = (own, *(self._entry(mirror) for mirror in own.settings.mirrors))
        return any(entry is not None and entry.logins_of(project_id) for entry in entries)

    def _entry(self, mirror: str) -> RegistryEntry | None:
        return self._entries.get(_bare(mirror).partition("/")[0])

    def _endpoint(self, address: str, project_id: str) -> tuple[Endpoint, list[LoginSource]]:
        entry = self._entry(address)
        logins = entry.logins_of(project_id) if entry is not None else []
        return self._reach(address), [login.source for login in logins]

    def _reach(self, address: str) -> Endpoint:
        bare, entry = _bare(address), self._entry(address)
        if entry is not None:
            return _endpoint(bare, entry.settings)
        # BuildKit takes plain HTTP for granted on loopback where nothing else is said.
        return Endpoint(bare, http=_without_port(bare.partition("/")[0]) in _LOCAL_HOSTS)

    def reach(self, host: str) -> Endpoint:
        """Return where a registry is, by the name that BuildKit has for it."""
        entry = self._named(host)
        return self._reach(host) if entry is None else _endpoint(host, entry.settings)

    def _named(self, host: str) -> RegistryEntry | None:
        """Return the table of a registry, by the name that BuildKit has for it."""
        return self._entries.get(DOCKER_HUB if host == origin_address(DOCKER_HUB) else host)

    def logins(
        self, project_id: str, session: aiohttp.ClientSession, *, trusted: bool
    ) -> PoolLogins:
        """Return the logins that builds of a project may use.

        Args:
            project_id: of the builds.
            session: for HTTP; its owner closes it.
            trusted: they may use any at all.
        """

        def of_host(host: str) -> list[PoolLogin]:
            entry = self._named(host)
            return entry.logins_of(project_id) if entry is not None and trusted else []

        some = any(of_host(host) for host in self._entries)
        return PoolLogins(self.reach, of_host, session, any_host=some)

    def mirrors(self, config: NodeConfig, database: CacheDatabase) -> Mirrors:
        """Return the node's base images; without any registry when they are turned off."""
        return Mirrors(
            self.sources if config.base_images else (lambda _project: []),
            database,
            BasePolicy(config.base_images_recheck, config.base_images_stale),
        )

    @asynccontextmanager
    async def serve(
        self,
        mirrors: Mirrors,
        address: str,
        store: ProjectStore,
        *,
        trusted: bool,
        elsewhere: Callable[[str], bool] = lambda _: False,
        judge: Judge | None = None,
    ) -> AsyncIterator[Bases]:
        """Give one BuildKit its way to base images while the context is open.

        Args:
            mirrors: of the node.
            address: HOST:PORT of the node's registry, as that BuildKit reaches it.
            store: of its project.
            trusted: its builds may have what the pool's logins can read.
            elsewhere: says of a host whether only that BuildKit can reach it.
            judge: of what the node itself reaches for them; None for everything. The mirror is
                not asked: it goes where registries of the configuration send it.
        """
        async with AsyncExitStack() as stack:
            session = mirrors.session
            if judge is not None:
                session = await stack.enter_async_context(new_session(judge))
            logins = self.logins(store.project_id, session, trusted=trusted)
            yield await stack.enter_async_context(
                self._bases(mirrors, address, store, logins, elsewhere, trusted=trusted)
            )

    @asynccontextmanager
    async def _bases(
        self,
        mirrors: Mirrors,
        address: str,
        store: ProjectStore,
        logins: PoolLogins,
        elsewhere: Callable[[str], bool],
        *,
        trusted: bool,
    ) -> AsyncIterator[Bases]:
        project = store.project_id
        hosts = [
            host
            for host in mirrors.hosts(project)
            if self._serves(host, project) and (trusted or not self._has_login(host, project))
        ]
        # Nothing but the way to it is guarded: the paths there are secrets.
        own = {address: RegistrySettings(http=True)}
        if not hosts:
            yield Bases(self.settings | own, None, logins, self.withheld)
            return
        async with mirrors.serve(store, hosts, elsewhere) as (path, images):
            found = self.settings | own
            for host in hosts:
                set_up = found.get(host, RegistrySettings())
                mirrored = (f"{address}/{path}/{host}", *set_up.mirrors)
                found[host] = replace(set_up, mirrors=mirrored)
            yield Bases(found, images, logins, self.withheld)


def _endpoint(address: str, settings: RegistrySettings) -> Endpoint:
    return Endpoint(address, settings.http, settings.insecure, tuple(settings.ca_files))


def _bare(address: str) -> str:
    return address.removeprefix("https://").removeprefix("http://")


def _without_port(host: str) -> str:
    return host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host

"""The registries that an administrator set up, and how this node's BuildKits reach them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_builder.buildkit.daemon_config import RegistrySettings
from offload_cache.mirror.connection import Endpoint
from offload_cache.mirror.handlers import Mirrors
from offload_cache.mirror.images import BasePolicy
from offload_cache.mirror.logins import LoginSource
from offload_cache.mirror.upstream import DOCKER_HUB, RegistrySource, origin_address
from offload_core.config import read_toml
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from offload_builder.node.config import NodeConfig
    from offload_cache.database import CacheDatabase
    from offload_cache.mirror.images import BaseImages
    from offload_cache.tiered import ProjectStore

_KINDS: dict[str, type] = {
    "http": bool,
    "insecure": bool,
    "mirrors": list,
    "ca": list,
    "base_images": bool,
    "username": str,
    "password_file": str,
    "password_env": str,
    "credential_helper": str,
    "projects": list,
}
_LOGIN_KEYS = {"username", "password_file", "password_env", "credential_helper"}
_FORMS = {bool: "true or false", list: "a list of texts", str: "a text"}
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One table of the registry file.

    Attributes:
        settings: what BuildKit is told; never a login.
        login: of the pool, None for none.
        base_images: whether images of this registry are cached.
        projects: for whom they are cached, and the login is used; empty for all.
    """

    settings: RegistrySettings = field(default_factory=RegistrySettings)
    login: LoginSource | None = None
    base_images: bool = True
    projects: frozenset[str] = frozenset()

    def serves(self, project_id: str) -> bool:
        """Whether a project gets what the pool's login can read."""
        return not self.projects or project_id in self.projects


@dataclass(frozen=True, slots=True)
class Bases:
    """What one BuildKit gets: its registry settings, and the project's base images, if cached."""

    registries: Mapping[str, RegistrySettings]
    images: BaseImages | None


class Registries:
    """All configured registries, by host as image names begin.

    Raises:
        ConfigError: the file cannot be read, or has a wrong key or value.
    """

    def __init__(self, path: Path | None) -> None:
        self._entries = _read(path) if path is not None else {}

    @property
    def settings(self) -> dict[str, RegistrySettings]:
        """Return what BuildKit is told where no base images are cached."""
        return {host: entry.settings for host, entry in self._entries.items()}

    def sources(self) -> list[RegistrySource]:
        """Return the registries whose images are cached: the configured ones and Docker Hub."""
        entries = {DOCKER_HUB: RegistryEntry(), **self._entries}
        return [
            RegistrySource(
                host,
                [
                    *(self._endpoint(mirror) for mirror in entry.settings.mirrors),
                    (_endpoint(origin_address(host), entry.settings), entry.login),
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

    def _has_login(self, host: str) -> bool:
        own = self._entries.get(host, RegistryEntry())
        entries = (own, *(self._entry(mirror) for mirror in own.settings.mirrors))
        return any(entry is not None and entry.login is not None for entry in entries)

    def _entry(self, mirror: str) -> RegistryEntry | None:
        return self._entries.get(_bare(mirror).partition("/")[0])

    def _endpoint(self, address: str) -> tuple[Endpoint, LoginSource | None]:
        bare = _bare(address)
        entry = self._entry(address)
        if entry is None:
            # BuildKit takes plain HTTP for granted on loopback where nothing else is said.
            local = _without_port(bare.partition("/")[0]) in _LOCAL_HOSTS
            return Endpoint(bare, http=local), None
        return _endpoint(bare, entry.settings), entry.login

    def mirrors(self, config: NodeConfig, database: CacheDatabase) -> Mirrors:
        """Return the node's base images; without any registry when they are turned off."""
        return Mirrors(
            self.sources() if config.base_images else [],
            database,
            BasePolicy(config.base_images_recheck, config.base_images_stale),
        )

    @asynccontextmanager
    async def serve(
        self, mirrors: Mirrors, address: str, store: ProjectStore, *, trusted: bool
    ) -> AsyncIterator[Bases]:
        """Give one BuildKit its way to base images while the context is open.

        Args:
            mirrors: of the node.
            address: HOST:PORT of the node's registry, as that BuildKit reaches it.
            store: of its project.
            trusted: its builds may have what the pool's logins can read.
        """
        hosts = [
            host
            for host in mirrors.hosts
            if self._serves(host, store.project_id) and (trusted or not self._has_login(host))
        ]
        if not hosts:
            yield Bases(self.settings, None)
            return
        async with mirrors.serve(store, hosts) as (path, images):
            found = self.settings
            for host in hosts:
                own = found.get(host, RegistrySettings())
                found[host] = replace(own, mirrors=(f"{address}/{path}/{host}", *own.mirrors))
            # Nothing but the way to it is guarded: the path is a secret of this BuildKit.
            found[address] = RegistrySettings(http=True)
            yield Bases(found, images)


def _endpoint(address: str, settings: RegistrySettings) -> Endpoint:
    return Endpoint(address, settings.http, settings.insecure, tuple(settings.ca_files))


def _bare(address: str) -> str:
    return address.removeprefix("https://").removeprefix("http://")


def _without_port(host: str) -> str:
    return host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host


def _read(path: Path) -> dict[str, RegistryEntry]:
    hosts = read_toml(path).get("registry", {})
    if not isinstance(hosts, dict) or not all(isinstance(table, dict) for table in hosts.values()):
        raise ConfigError(f'{path}: write one table per host, for example [registry."docker.io"]')
    return {host: _entry(path, host, table) for host, table in hosts.items()}


def _entry(path: Path, host: str, table: dict[str, Any]) -> RegistryEntry:
    for key, value in table.items():
        kind = _KINDS.get(key)
        if kind is None:
            raise ConfigError(
                f"{path}: unknown key {key!r} in registry {host!r}; "
                f"known keys are {', '.join(sorted(_KINDS))}"
            )
        fits = isinstance(value, kind)
        if fits and kind is list:
            fits = all(isinstance(item, str) for item in value)
        if not fits:
            raise ConfigError(f"{path}: {key} of registry {host!r} must be {_FORMS[kind]}")
    login = None
    if not _LOGIN_KEYS.isdisjoint(table):
        secret = table.get("password_file")
        try:
            login = LoginSource(
                table.get("username", ""),
                Path(secret).expanduser() if secret else None,
                table.get("password_env", ""),
                table.get("credential_helper", ""),
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: registry {host!r}: {error.message}") from error
    return RegistryEntry(
        RegistrySettings(
            http=table.get("http", False),
            insecure=table.get("insecure", False),
            mirrors=tuple(table.get("mirrors", ())),
            ca_files=tuple(Path(item) for item in table.get("ca", ())),
        ),
        login,
        table.get("base_images", True),
        frozenset(table.get("projects", ())),
    )

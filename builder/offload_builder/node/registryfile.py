"""The file in which an administrator describes registries: docs/registries.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from offload_builder.buildkit.daemon_config import RegistrySettings
from offload_cache.mirror.logins import LoginSource
from offload_cache.mirror.patterns import EVERYTHING, matches
from offload_core.config import read_toml
from offload_core.errors import ConfigError
from offload_core.units import parse_duration


class Key(NamedTuple):
    """A key of the file: the form of its value, and what it means (docs/registries.md)."""

    kind: type
    about: str


_PROJECTS = Key(
    list, "patterns of projects: images are cached and logins used for them only; all by default"
)
LOGIN_KEYS = {
    "username": Key(str, "user of the pool's login, with one of the next two"),
    "password_file": Key(str, "file with the password, read again when it is needed"),
    "password_env": Key(str, "variable of the node's process with the password"),
    "credential_helper": Key(
        str, "`NAME` of a program `docker-credential-NAME` in the node's `PATH`"
    ),
    "credential_command": Key(
        list, "a program with arguments that answers as a credential helper does"
    ),
    "credential_lifetime": Key(
        str, "how long an answer is used when it does not say when it expires; `5m` by default"
    ),
    "repositories": Key(list, "patterns of repositories that the login reads; all by default"),
    "push": Key(list, "patterns of repositories that builds may push to with it; none by default"),
}
REGISTRY_KEYS = {
    "http": Key(bool, "speak plain HTTP"),
    "insecure": Key(bool, "accept any certificate"),
    "ca": Key(list, "files with certificates of its authorities, beside the system's"),
    "mirrors": Key(
        list,
        "hosts, also with a path, that are asked before the registry; a table of their own says "
        "how they are reached",
    ),
    "base_images": Key(
        bool, "`false`: images of this registry are not cached, every BuildKit pulls them itself"
    ),
    "projects": _PROJECTS,
}
_KINDS = REGISTRY_KEYS | LOGIN_KEYS
_TABLE_KINDS = LOGIN_KEYS | {"projects": _PROJECTS}
_FORMS = {bool: "true or false", list: "a list of texts", str: "a text"}


@dataclass(frozen=True, slots=True)
class PoolLogin:
    """One login of the pool.

    Attributes:
        source: where it comes from, and the repositories that it reads.
        projects: patterns of the projects whose builds have it.
        push: patterns of the repositories that it may push to.
    """

    source: LoginSource
    projects: tuple[str, ...] = (EVERYTHING,)
    push: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One table of the registry file.

    Attributes:
        settings: what BuildKit is told; never a login.
        logins: of the pool; the first that fits a project and a repository is used.
        base_images: whether images of this registry are cached.
        projects: patterns of the projects for which they are cached.
    """

    settings: RegistrySettings = field(default_factory=RegistrySettings)
    logins: tuple[PoolLogin, ...] = ()
    base_images: bool = True
    projects: tuple[str, ...] = (EVERYTHING,)

    def serves(self, project_id: str) -> bool:
        """Whether images are cached for a project."""
        return matches(self.projects, project_id)

    def logins_of(self, project_id: str) -> list[PoolLogin]:
        """Return the logins that builds of a project have."""
        return [login for login in self.logins if matches(login.projects, project_id)]


def read_registries(path: Path) -> dict[str, RegistryEntry]:
    """Return the tables of a file by host.

    Raises:
        ConfigError: it cannot be read, or has a wrong key or value.
    """
    hosts = read_toml(path).get("registry", {})
    if not isinstance(hosts, dict) or not all(isinstance(table, dict) for table in hosts.values()):
        raise ConfigError(f'{path}: write one table per host, for example [registry."docker.io"]')
    return {host: _entry(f"{path}: registry {host!r}", table) for host, table in hosts.items()}


def _entry(place: str, table: dict[str, Any]) -> RegistryEntry:
    tables = table.get("login", [])
    if not isinstance(tables, list) or not all(isinstance(item, dict) for item in tables):
        raise ConfigError(f"{place}: write each login as a table [[registry.HOST.login]]")
    own = {key: value for key, value in table.items() if key != "login"}
    _check(place, own, _KINDS)
    projects = tuple(table.get("projects", (EVERYTHING,)))
    logins = []
    if not own.keys().isdisjoint(LOGIN_KEYS):
        logins.append(_login(place, own, projects))
    for item in tables:
        _check(f"{place}: login", item, _TABLE_KINDS)
        logins.append(_login(place, item, tuple(item.get("projects", projects))))
    return RegistryEntry(
        RegistrySettings(
            http=table.get("http", False),
            insecure=table.get("insecure", False),
            mirrors=tuple(table.get("mirrors", ())),
            ca_files=tuple(Path(item) for item in table.get("ca", ())),
        ),
        tuple(logins),
        table.get("base_images", True),
        projects,
    )


def _check(place: str, table: dict[str, Any], kinds: dict[str, Key]) -> None:
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join(sorted(kinds))
            raise ConfigError(f"{place}: unknown key {key!r}; known keys are {known}")
        kind = kinds[key].kind
        fits = isinstance(value, kind)
        if fits and kind is list:
            fits = all(isinstance(item, str) for item in value)
        if not fits:
            raise ConfigError(f"{place}: {key} must be {_FORMS[kind]}")


def _login(place: str, table: dict[str, Any], projects: tuple[str, ...]) -> PoolLogin:
    secret = table.get("password_file")
    life = table.get("credential_lifetime")
    more: dict[str, Any] = {}
    try:
        if life is not None:
            more["life_seconds"] = parse_duration(life)
        source = LoginSource(
            table.get("username", ""),
            Path(secret).expanduser() if secret else None,
            table.get("password_env", ""),
            table.get("credential_helper", ""),
            tuple(table.get("credential_command", ())),
            repositories=tuple(table.get("repositories", (EVERYTHING,))),
            **more,
        )
    except (ConfigError, ValueError) as error:
        cause = error.message if isinstance(error, ConfigError) else str(error)
        raise ConfigError(f"{place}: {cause}") from error
    return PoolLogin(source, projects, tuple(table.get("push", ())))

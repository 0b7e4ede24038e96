"""The pool's logins for one BuildKit: which build may use which one, where, and for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from offload_cache.mirror.connection import Connection
from offload_cache.mirror.logins import Logins
from offload_cache.mirror.patterns import EVERYTHING, matches
from offload_cache.mirror.upstream import helper_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import aiohttp

    from offload_builder.node.registryfile import PoolLogin
    from offload_cache.mirror.connection import Endpoint
    from offload_cache.mirror.logins import Login

_READING = frozenset(("pull",))
_WRITING = frozenset(("pull", "push"))


class Grant(NamedTuple):
    """A login of the pool, and what may be asked for with it."""

    login: Login
    scopes: tuple[str, ...]


class PoolLogins:
    """The registries of one project and trust domain, as the agent itself reaches them.

    Args:
        endpoint: tells where the registry of a host is.
        logins: of the pool at a host, for this project; none for untrusted members.
        session: for HTTP; its owner closes it.
        any_host: there may be a login at any host at all.
    """

    def __init__(
        self,
        endpoint: Callable[[str], Endpoint],
        logins: Callable[[str], Sequence[PoolLogin]],
        session: aiohttp.ClientSession,
        *,
        any_host: bool = True,
    ) -> None:
        self.any_host = any_host
        self._endpoint = endpoint
        self._rules = logins
        self._session = session
        self._connections: dict[str, Connection] = {}
        # By host as well: a helper answers each registry with another login.
        self._logins: dict[tuple[str, PoolLogin], Logins] = {}

    def connection(self, host: str) -> Connection:
        """Return the way to a registry, and to its token service.

        Raises:
            ConfigError: a certificate file cannot be read.
        """
        found = self._connections.get(host)
        if found is None:
            found = self._connections[host] = Connection(self._endpoint(host), self._session)
        return found

    def has_login(self, host: str) -> bool:
        """Whether the pool has any login for this project at a host."""
        return bool(self._rules(host))

    def problem(self, host: str) -> str:
        """Return why the pool's login at a host cannot be read; empty when it can."""
        known = (self._logins.get((host, rule)) for rule in self._rules(host))
        return next((item.problem for item in known if item is not None and item.problem), "")

    async def grant(self, host: str, scopes: Sequence[str], *, fresh: bool = False) -> Grant | None:
        """Return a login for a token, with the scopes that the administrator allows.

        Args:
            host: of the registry.
            scopes: that it asks for, as "repository:NAME:pull,push".
            fresh: what was read before is refused.
        """
        for rule in self._rules(host):
            allowed = tuple(filter(None, (_allowed(rule, scope) for scope in scopes)))
            if allowed and (login := await self._read(host, rule, fresh=fresh)) is not None:
                return Grant(login, allowed)
        return None

    async def whole(self, host: str) -> Login | None:
        """Return a login that BuildKit itself may have: one without any limit to repositories.

        A registry without a token service gives whoever knows its password all its rights.
        """
        for rule in self._rules(host):
            if EVERYTHING in rule.push and EVERYTHING in rule.source.repositories:
                return await self._read(host, rule, fresh=False)
        return None

    async def _read(self, host: str, rule: PoolLogin, *, fresh: bool) -> Login | None:
        found = self._logins.get((host, rule))
        if found is None:
            address = self._endpoint(host).address
            found = self._logins[host, rule] = Logins(helper_name(address), rule.source)
        return await found.get(fresh=fresh)


def _allowed(rule: PoolLogin, scope: str) -> str:
    """Return the part of a scope that a login may be used for; empty for nothing."""
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    if kind != "repository" or not name:
        return ""
    rights: frozenset[str] = frozenset()
    if matches(rule.source.repositories, name):
        rights |= _READING
    if matches(rule.push, name):
        rights |= _WRITING
    kept = [action for action in actions.split(",") if action in rights]
    return f"repository:{name}:{','.join(kept)}" if kept else ""


def repository_of(scopes: Sequence[str]) -> str:
    """Return the repository that a token is mainly for; empty when no scope names one.

    With a push come rights to read other repositories, from which layers could be mounted.
    """
    names = [scope.partition(":")[2].rpartition(":") for scope in scopes if "repository:" in scope]
    pushed = [name for name, _, actions in names if "push" in actions.split(",")]
    return next(iter(pushed or [name for name, _, _ in names]), "")

"""Registry logins for one build: of the person who builds, and of the pool.

docs/registries.md says which of them is used when. BuildKit gets tokens; a login itself only where
a registry has no token service.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from offload_builder.buildkit.providers import TokenAnswer, TokenDeniedError
from offload_builder.node.poollogins import repository_of
from offload_builder.node.registrytrouble import REFUSED, RegistryTrouble, Whose
from offload_cache.mirror.errors import AwayError, DeniedError, RefusedError
from offload_cache.mirror.logins import IDENTITY_USER, Login
from offload_cache.mirror.tokens import TokenWish, fetch_token
from offload_core.aio import TaskSet
from offload_core.errors import ConfigError, NodeLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.buildkit.providers import TokenRequest
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.poollogins import PoolLogins
    from offload_cache.mirror.tokens import Token

log = structlog.get_logger(__name__)

SLOW_SECONDS = 1.5
_MAX_TROUBLES = 32


class _Chosen(NamedTuple):
    login: Login | None
    scopes: tuple[str, ...]
    whose: Whose


class BuildLogins:
    """Logins of one build; nothing of them leaves this object's memory but to their registry.

    Args:
        link: to the person, who is asked once per registry and repository.
        pool: the administrator's logins for this project; None for none.

    Attributes:
        troubles: what went wrong, newest last.
    """

    def __init__(self, link: ClientLink, pool: PoolLogins | None) -> None:
        self.troubles: list[RegistryTrouble] = []
        self._link = link
        self._pool = pool
        self._authority = secrets.token_bytes(32)
        self._asked: dict[tuple[str, str], asyncio.Task[tuple[str, str]]] = {}
        self._answers: dict[tuple[str, str], tuple[str, str]] = {}
        self._tasks = TaskSet()
        self._prefetching: list[asyncio.Task[tuple[str, str]]] = []

    @property
    def authority(self) -> bytes:
        """Random bytes of this build: BuildKit gives its tokens to no other one."""
        return self._authority

    @property
    def given(self) -> bool:
        """Whether the person had a login for a registry that was asked for."""
        return any(any(answer) for answer in self._answers.values())

    def prefetch(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Ask the person now for logins that are needed at the end, when they may have left.

        Args:
            wanted: registry hosts with repositories.
        """
        for host, repository in wanted:
            asking = self._of_person(host, repository)
            self._prefetching.append(self._tasks.start(asking, name=f"login.{host}"))

    async def prefetched(self) -> None:
        """Wait until the person is needed no more for these."""
        if self._prefetching:
            await asyncio.wait(self._prefetching)

    async def credentials(self, host: str) -> tuple[str, str]:
        """Return user and secret for a registry without a token service; empty for none."""
        found = await self._of_person(host, "")
        if not any(found):
            # A login that was asked for with a repository is good as well.
            answers = [answer for (name, _), answer in self._answers.items() if name == host]
            found = next((answer for answer in answers if any(answer)), found)
        if any(found):
            self._note(host, "", Whose.PERSON, user=found[0])
            return found
        login = await self._pool.whole(host) if self._pool is not None else None
        if login is not None:
            self._note(host, "", Whose.POOL)
            return ("" if login.is_identity_token else login.username), login.secret
        if self._pool is not None and self._pool.has_login(host):
            problem = self._pool.problem(host) or (
                f"the pool's login for {host} is limited to some repositories or to reading, and"
                " this registry cannot limit a login"
            )
            self._note(host, "", Whose.NOBODY, cause=problem)
        else:
            self._note(host, "", Whose.NOBODY)
        return "", ""

    async def token(self, request: TokenRequest) -> TokenAnswer:
        """Return a token for a registry.

        Raises:
            TokenDeniedError: there is none.
        """
        host, repository = request.host, repository_of(request.scopes)
        if self._pool is None:
            raise TokenDeniedError(f"no registry is asked for {host} here")
        chosen = _Chosen(None, request.scopes, Whose.NOBODY)
        try:
            chosen = await self._choose(self._pool, request, repository)
            token = await self._fetch(self._pool, request, chosen)
        except (DeniedError, AwayError, RefusedError, ConfigError) as error:
            user = chosen.login.username if chosen.login is not None else ""
            trouble = self._note(
                host,
                repository,
                chosen.whose,
                user=user,
                cause=f"{REFUSED}{error}" if isinstance(error, RefusedError) else str(error),
                denied=isinstance(error, DeniedError),
            )
            log.info("registry.token.failed", host=host, repository=repository, cause=str(error))
            raise TokenDeniedError(str(trouble)) from error
        # What the registry does not allow now, it says itself; then it is known whose login it was.
        self._note(host, repository, chosen.whose)
        return TokenAnswer(token.text, max(int(_left(token)), 1))

    async def _choose(self, pool: PoolLogins, request: TokenRequest, repository: str) -> _Chosen:
        username, secret = await self._of_person(request.host, repository)
        if secret:
            return _Chosen(Login(username or IDENTITY_USER, secret), request.scopes, Whose.PERSON)
        if grant := await pool.grant(request.host, request.scopes):
            return _Chosen(grant.login, grant.scopes, Whose.POOL)
        if problem := pool.problem(request.host):
            raise DeniedError(problem)
        return _Chosen(None, request.scopes, Whose.NOBODY)

    async def _fetch(self, pool: PoolLogins, request: TokenRequest, chosen: _Chosen) -> Token:
        connection = pool.connection(request.host)
        wish = TokenWish(request.realm, request.service, chosen.scopes)
        slow = self._tasks.start(self._tell_slow(request), name="login.slow")
        try:
            try:
                return await fetch_token(connection, wish, chosen.login)
            except DeniedError:
                if chosen.whose is not Whose.POOL:
                    raise
                again = await pool.grant(request.host, request.scopes, fresh=True)
                if again is None or again.login == chosen.login:
                    raise
                return await fetch_token(connection, wish, again.login)
        finally:
            slow.cancel()

    async def _tell_slow(self, request: TokenRequest) -> None:
        await asyncio.sleep(SLOW_SECONDS)
        await self._link.notice(
            f"the token service of {request.host} has not answered for {SLOW_SECONDS:g} seconds; "
            "the build waits for it, check that the node can reach it"
        )

    async def _of_person(self, host: str, repository: str) -> tuple[str, str]:
        """Ask the person, once; nobody, when the person has left."""
        key = host, repository
        if key in self._answers:
            return self._answers[key]
        asking = self._asked.get(key)
        if asking is None:
            asking = self._asked[key] = self._tasks.start(self._ask(key), name=f"login.{host}")
        return await asyncio.shield(asking)

    async def _ask(self, key: tuple[str, str]) -> tuple[str, str]:
        try:
            found = await self._link.request_credentials(*key)
        except NodeLostError:
            return "", ""
        else:
            self._answers[key] = found
            return found
        finally:
            del self._asked[key]

    async def close(self) -> None:
        """Forget everything."""
        await self._tasks.close()
        self._answers.clear()

    def _note(
        self,
        host: str,
        repository: str,
        whose: Whose,
        *,
        user: str = "",
        cause: str = "",
        denied: bool = True,
    ) -> RegistryTrouble:
        trouble = RegistryTrouble(host, repository, whose, user, cause, denied)
        self.troubles = [
            item for item in self.troubles if (item.host, item.repository) != (host, repository)
        ][-_MAX_TROUBLES:]
        self.troubles.append(trouble)
        return trouble


def _left(token: Token) -> float:
    """Return how long a token is still good, whatever the clock of its service says."""
    left = token.issued_at + token.life_seconds - time.time()
    return left if 0 < left < token.life_seconds else token.life_seconds

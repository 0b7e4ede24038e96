"""Proving oneself to a registry.

Source: distribution, "Token Authentication Specification" and "OAuth 2.0 token authentication".
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from offload_cache.mirror.challenges import parse_challenges
from offload_cache.mirror.errors import AwayError, DeniedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_cache.mirror.connection import Connection
    from offload_cache.mirror.logins import Login


class LoginSupply(Protocol):
    """Gives a login for one registry."""

    @property
    def problem(self) -> str:
        """Why there is none, one sentence; empty when there is one, or none was meant to be."""
        ...

    def covers(self, repository: str) -> bool:
        """Return whether it is for a repository."""
        ...

    async def get(self, *, fresh: bool = False) -> Login | None:
        """Return the login, None for none; `fresh` when the one before was refused."""
        ...


CLIENT_ID = "offload-build"
PULL = "pull"
_DEFAULT_LIFE_SECONDS = 60.0  # "expires_in": the specification's default
_MARGIN = 0.8
_MAX_TOKENS = 1000
_NO_GET = frozenset((404, 405))


@dataclass(frozen=True, slots=True)
class TokenWish:
    """What a registry asks for in its challenge.

    Attributes:
        realm: URL of the token service.
        service: name of the registry there.
        scopes: rights, as "repository:NAME:pull,push".
    """

    realm: str
    service: str
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A bearer token, in memory only.

    Attributes:
        text: what is sent.
        life_seconds: how long it is good from `issued_at` on.
        issued_at: seconds since 1970; 0 when the service does not say.
    """

    text: str
    life_seconds: float
    issued_at: int = 0


async def fetch_token(connection: Connection, wish: TokenWish, login: Login | None) -> Token:
    """Ask the token service of a registry.

    An identity token is sent as the specification's refresh token. A password goes with GET, which
    every service knows but few that want it in a form.

    Raises:
        DeniedError: it refuses the login, or the login may not be sent there.
        AwayError: it does not answer.
    """
    if urlsplit(wish.realm).scheme not in {"http", "https"}:
        raise DeniedError("the registry names no token service")
    if login is None:
        status, answer = await _get(connection, wish, None)
    elif not connection.may_send_login(wish.realm):
        raise DeniedError("the registry's token service does not use TLS")
    elif login.is_identity_token:
        form = {"grant_type": "refresh_token", "refresh_token": login.secret}
        status, answer = await _post(connection, wish, form)
    else:
        status, answer = await _get(connection, wish, login)
        if status in _NO_GET:
            form = {
                "grant_type": "password", "username": login.username, "password": login.secret,
            }  # fmt: skip
            status, answer = await _post(connection, wish, form)
    if status in {400, 401, 403, 404}:
        raise DeniedError(f"the registry's token service answers {status}")
    text = answer.get("token") or answer.get("access_token")
    if status != 200 or not isinstance(text, str) or not text.isprintable():
        raise AwayError(f"the registry's token service answers {status} and gives no token")
    life = answer.get("expires_in", _DEFAULT_LIFE_SECONDS)
    if isinstance(life, bool) or not isinstance(life, (int, float)) or life <= 0:
        life = _DEFAULT_LIFE_SECONDS
    return Token(text, float(life), _moment(answer.get("issued_at")))


async def _get(
    connection: Connection, wish: TokenWish, login: Login | None
) -> tuple[int, dict[str, object]]:
    query = [("service", wish.service)] if wish.service else []
    query += [("scope", scope) for scope in wish.scopes]
    headers = {"Authorization": login.basic} if login is not None else {}
    return await connection.json("GET", wish.realm, query=query, headers=headers)


async def _post(
    connection: Connection, wish: TokenWish, form: dict[str, str]
) -> tuple[int, dict[str, object]]:
    whole = {
        "service": wish.service, "scope": " ".join(wish.scopes), "client_id": CLIENT_ID, **form,
    }  # fmt: skip
    return await connection.json("POST", wish.realm, form=whole)


def _moment(text: object) -> int:
    if not isinstance(text, str):
        return 0
    try:
        return max(int(datetime.fromisoformat(text).timestamp()), 0)
    except (ValueError, OverflowError):
        return 0


class Authorizer:
    """Authorization headers for one registry, remembered per repository.

    Args:
        connection: to the registry.
        logins: of the pool there, or of a caller; the first that covers a repository is used.
    """

    def __init__(self, connection: Connection, logins: Sequence[LoginSupply]) -> None:
        self._connection = connection
        self._logins = logins
        self._headers: dict[str, tuple[str, float]] = {}

    def header(self, repository: str) -> str:
        """Return the header that worked for a repository and is still valid; empty for none."""
        header, until = self._headers.get(repository, ("", 0.0))
        return header if time.monotonic() < until else ""

    async def answer(
        self, repository: str, challenges: list[str], *, refused: bool, actions: str = PULL
    ) -> str:
        """Return a header that answers a 401.

        Args:
            repository: that was asked for.
            challenges: the `WWW-Authenticate` headers.
            refused: a header was sent and was not enough.
            actions: what is to be done in the repository; beyond reading, what the registry asks
                for counts.

        Raises:
            DeniedError: the pool has nothing to answer with.
            AwayError: the registry's token service does not answer.
        """
        self._headers.pop(repository, None)
        chosen = next((item for item in self._logins if item.covers(repository)), None)
        login = await chosen.get(fresh=refused) if chosen is not None else None
        for challenge in parse_challenges(challenges):
            if challenge.scheme == "bearer":
                # Whatever the registry asks for: who only reads needs this one repository.
                wanted = challenge.parameters.get("scope") if actions != PULL else None
                scope = wanted or f"repository:{repository}:{actions}"
                wish = TokenWish(
                    challenge.parameters.get("realm", ""),
                    challenge.parameters.get("service", ""),
                    tuple(scope.split(" ")),
                )
                token = await fetch_token(self._connection, wish, login)
                header, life = f"Bearer {token.text}", token.life_seconds
            elif challenge.scheme == "basic" and login is not None:
                header, life = login.basic, _DEFAULT_LIFE_SECONDS
            else:
                continue
            if len(self._headers) >= _MAX_TOKENS:
                self._headers.clear()
            self._headers[repository] = (header, time.monotonic() + life * _MARGIN)
            return header
        if chosen is not None and chosen.problem:
            raise DeniedError(chosen.problem)
        raise DeniedError("the registry asks for a login, and the pool has none for it")

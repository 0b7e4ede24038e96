"""Proving the pool to an upstream registry.

Source: distribution, "Token Authentication Specification" and "OAuth 2.0 token authentication".
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from offload_cache.mirror.challenges import parse_challenges
from offload_cache.mirror.errors import AwayError, DeniedError

if TYPE_CHECKING:
    from offload_cache.mirror.connection import Connection
    from offload_cache.mirror.logins import Login, Logins

_DEFAULT_LIFE_SECONDS = 60.0  # "expires_in": the specification's default
_MARGIN = 0.8
_MAX_TOKENS = 1000


class Authorizer:
    """Authorization headers for one registry, remembered per repository."""

    def __init__(self, connection: Connection, logins: Logins) -> None:
        self._connection = connection
        self._logins = logins
        self._headers: dict[str, tuple[str, float]] = {}

    def header(self, repository: str) -> str:
        """Return the header that worked for a repository and is still valid; empty for none."""
        header, until = self._headers.get(repository, ("", 0.0))
        return header if time.monotonic() < until else ""

    async def answer(self, repository: str, challenges: list[str], *, refused: bool) -> str:
        """Return a header that answers a 401.

        Args:
            repository: that was asked for.
            challenges: the `WWW-Authenticate` headers.
            refused: a header was sent and was not enough.

        Raises:
            DeniedError: the pool has nothing to answer with.
            AwayError: the registry's token service does not answer.
        """
        self._headers.pop(repository, None)
        login = await self._logins.get(fresh=refused)
        for challenge in parse_challenges(challenges):
            if challenge.scheme == "bearer":
                header, life = await self._token(repository, challenge.parameters, login)
            elif challenge.scheme == "basic" and login is not None:
                header, life = login.basic, _DEFAULT_LIFE_SECONDS
            else:
                continue
            if len(self._headers) >= _MAX_TOKENS:
                self._headers.clear()
            self._headers[repository] = (header, time.monotonic() + life * _MARGIN)
            return header
        raise DeniedError("the registry asks for a login, and the pool has none for it")

    async def _token(
        self, repository: str, parameters: dict[str, str], login: Login | None
    ) -> tuple[str, float]:
        realm = parameters.get("realm", "")
        if urlsplit(realm).scheme not in {"http", "https"}:
            raise DeniedError("the registry names no token service")
        if login is not None and not self._connection.may_send_login(realm):
            raise DeniedError("the registry's token service does not use TLS")
        query = {
            "service": parameters.get("service", ""),
            "scope": parameters.get("scope") or f"repository:{repository}:pull",
        }
        if login is not None and login.is_identity_token:
            form = {
                **query,
                "grant_type": "refresh_token",
                "refresh_token": login.secret,
                "client_id": "offload-build",
            }
            status, answer = await self._connection.json("POST", realm, form=form)
        else:
            headers = {"Authorization": login.basic} if login is not None else {}
            status, answer = await self._connection.json(
                "GET", realm, query={key: text for key, text in query.items() if text},
                headers=headers,
            )  # fmt: skip
        if status in {400, 401, 403, 404}:
            raise DeniedError(f"the registry's token service answers {status}")
        token = answer.get("token") or answer.get("access_token")
        if status != 200 or not isinstance(token, str) or not token.isprintable():
            raise AwayError(f"the registry's token service answers {status} and gives no token")
        life = answer.get("expires_in", _DEFAULT_LIFE_SECONDS)
        if isinstance(life, bool) or not isinstance(life, (int, float)) or life <= 0:
            life = _DEFAULT_LIFE_SECONDS
        return f"Bearer {token}", float(life)

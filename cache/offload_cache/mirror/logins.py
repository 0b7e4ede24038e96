"""The pool's logins at upstream registries: from a file, a variable, or a helper program."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_cache.mirror.loginhelper import HelperError, ask_helper
from offload_cache.mirror.patterns import EVERYTHING, matches
from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_log = structlog.get_logger(__name__)
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEEP_SECONDS = 300.0
_RETRY_SECONDS = 15.0
_RENEW_AT = 0.8
IDENTITY_USER = "<token>"
"""User name by which docker's credential helpers mark an identity token."""


@dataclass(frozen=True, slots=True)
class LoginSource:
    """Where the pool's login for a registry comes from; holds no secret itself.

    Attributes:
        username: the user; not used with a helper or a command.
        password_file: file with the password; read again when it is needed, so it may rotate.
        password_env: variable with the password.
        helper: `NAME` of a program `docker-credential-NAME`.
        command: a program with arguments that speaks the protocol of credential helpers.
        life_seconds: how long an answer is good, unless a helper says when it expires.
        repositories: patterns of the repositories that the login is used for.
    """

    username: str = ""
    password_file: Path | None = None
    password_env: str = ""
    helper: str = ""
    command: tuple[str, ...] = ()
    life_seconds: float = _KEEP_SECONDS
    repositories: tuple[str, ...] = (EVERYTHING,)

    def __post_init__(self) -> None:
        """Refuse what cannot be a login.

        Raises:
            ConfigError: with what is missing or too much.
        """
        programs = bool(self.helper), bool(self.command)
        if sum((self.password_file is not None, bool(self.password_env), *programs)) != 1:
            raise ConfigError(
                "a login needs one of password_file, password_env, credential_helper and "
                "credential_command"
            )
        if bool(self.username) is any(programs):
            raise ConfigError(
                "a login needs a username, and none with credential_helper or credential_command"
            )
        if self.helper and not _HELPER.fullmatch(self.helper):
            raise ConfigError(f"credential_helper {self.helper[:80]!r} is no name of a helper")
        if self.life_seconds <= 0:
            raise ConfigError("credential_lifetime must be more than zero")

    @property
    def program(self) -> tuple[str, ...]:
        """The program that is asked, with its arguments; empty for none."""
        return (f"docker-credential-{self.helper}", "get") if self.helper else self.command


@dataclass(frozen=True, slots=True, repr=False)
class Login:
    """A user and a secret, in memory only."""

    username: str
    secret: str

    @property
    def basic(self) -> str:
        """The value of an Authorization header: RFC 7617."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode()

    @property
    def is_identity_token(self) -> bool:
        """Whether the secret is a refresh token."""
        return self.username in {"", IDENTITY_USER}

    def __repr__(self) -> str:
        return "Login(***)"


class Logins:
    """Reads one registry's login and keeps it until it is soon to expire.

    Args:
        host: the registry, as a credential helper knows it.
        source: where the login comes from, None for none.

    Attributes:
        problem: why it cannot be read, one sentence for administrators; empty when it can.
    """

    def __init__(self, host: str, source: LoginSource | None) -> None:
        self.problem = ""
        self._host = host
        self._source = source
        self._login: Login | None = None
        self._good_until = 0.0
        self._lock = asyncio.Lock()

    def covers(self, repository: str) -> bool:
        """Whether the login is for a repository."""
        return self._source is not None and matches(self._source.repositories, repository)

    async def get(self, *, fresh: bool = False) -> Login | None:
        """Return the login; None when there is none or it cannot be read now.

        A helper that failed is left alone for some seconds, so that it holds up one build only.

        Args:
            fresh: what was read before is refused by the registry.
        """
        source = self._source
        if source is None:
            return None
        async with self._lock:
            refused = fresh and self._login is not None
            if refused or time.monotonic() > self._good_until:
                self.problem = ""
                self._login, life = await self._read(source)
                self._good_until = time.monotonic() + life
            return self._login

    async def _read(self, source: LoginSource) -> tuple[Login | None, float]:
        try:
            if program := source.program:
                answer = await ask_helper(program, self._host)
                life = source.life_seconds
                if answer.expires_at:
                    life = (answer.expires_at - time.time()) * _RENEW_AT
                return Login(answer.username, answer.secret), max(life, 0.0)
            if source.password_file is not None:
                secret = source.password_file.read_text("utf-8").strip()
            else:
                secret = os.environ.get(source.password_env, "")
        except HelperError as error:
            self._unreadable(str(error))
            return None, _RETRY_SECONDS
        except (OSError, ValueError) as error:
            # The text of a ValueError could hold what was read.
            cause = error.strerror if isinstance(error, OSError) else type(error).__name__
            self._unreadable(f"{source.password_file}: {cause}")
            return None, 0.0
        if not secret:
            place = source.password_file or f"the variable {source.password_env}"
            self._unreadable(f"{place} is empty")
            return None, 0.0
        return Login(source.username, secret), source.life_seconds

    def _unreadable(self, cause: str) -> None:
        self.problem = f"the pool's login for {self._host} cannot be read: {cause}"
        _log.warning("base_images.login.unreadable", host=self._host, cause=cause)

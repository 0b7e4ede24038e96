"""The pool's logins at upstream registries: from a file, a variable, or a credential helper."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_log = structlog.get_logger(__name__)
_HELPER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HELPER_SECONDS = 20.0
_KEEP_SECONDS = 300.0
IDENTITY_USER = "<token>"
"""User name by which docker's credential helpers mark an identity token."""


@dataclass(frozen=True, slots=True)
class LoginSource:
    """Where the pool's login for a registry comes from; holds no secret itself.

    Attributes:
        username: the user; not used with a helper.
        password_file: file with the password; read again when it is needed, so it may rotate.
        password_env: variable with the password.
        helper: `NAME` of a program `docker-credential-NAME`.
    """

    username: str = ""
    password_file: Path | None = None
    password_env: str = ""
    helper: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be a login.

        Raises:
            ConfigError: with what is missing or too much.
        """
        ways = (self.password_file is not None, bool(self.password_env), bool(self.helper))
        if sum(ways) != 1:
            raise ConfigError(
                "a login needs one of password_file, password_env and credential_helper"
            )
        if bool(self.username) is bool(self.helper):
            raise ConfigError("a login needs a username, and none with credential_helper")
        if self.helper and not _HELPER.fullmatch(self.helper):
            raise ConfigError(f"credential_helper {self.helper[:80]!r} is no name of a helper")


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
        return self.username == IDENTITY_USER

    def __repr__(self) -> str:
        return "Login(***)"


class Logins:
    """Reads one registry's login and keeps it for some minutes.

    Args:
        host: the registry, as a credential helper knows it.
        source: where the login comes from, None for none.
    """

    def __init__(self, host: str, source: LoginSource | None) -> None:
        self._host = host
        self._source = source
        self._login: Login | None = None
        self._read_at = 0.0
        self._lock = asyncio.Lock()

    async def get(self, *, fresh: bool = False) -> Login | None:
        """Return the login; None when there is none or it cannot be read now.

        Args:
            fresh: what was read before is refused by the registry.
        """
        source = self._source
        if source is None:
            return None
        async with self._lock:
            if fresh or time.monotonic() - self._read_at > _KEEP_SECONDS or self._login is None:
                self._login = await self._read(source)
                self._read_at = time.monotonic()
            return self._login

    async def _read(self, source: LoginSource) -> Login | None:
        try:
            if source.helper:
                return await self._ask_helper(source.helper)
            if source.password_file is not None:
                secret = source.password_file.read_text("utf-8").strip()
            else:
                secret = os.environ.get(source.password_env, "")
        except (OSError, ValueError, KeyError, TypeError) as error:
            # The text of a ValueError could hold what was read.
            cause = error.strerror if isinstance(error, OSError) else type(error).__name__
            _log.warning("base_images.login.unreadable", host=self._host, cause=cause)
            return None
        if not secret:
            _log.warning("base_images.login.unreadable", host=self._host, cause="it is empty")
            return None
        return Login(source.username, secret)

    async def _ask_helper(self, name: str) -> Login | None:
        process = await asyncio.create_subprocess_exec(
            f"docker-credential-{name}",
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(_HELPER_SECONDS):
                output, _ = await process.communicate(self._host.encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            _log.warning(
                "base_images.login.unreadable",
                host=self._host,
                cause=f"docker-credential-{name} ended with code {process.returncode}",
            )
            return None
        answer = json.loads(output)
        return Login(str(answer["Username"]), str(answer["Secret"]))

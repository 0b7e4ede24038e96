"""The identity provider of people: its endpoints, and what its token endpoint answers.

Sources: OpenID Connect Discovery 1.0, OpenID Connect Core 1.0 (sections 3.1.3.3 and 12), RFC 6749,
RFC 7009 and RFC 8414 (section 2, revocation_endpoint).
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload_client.oidc.webcalls import WebAnswer, call_json, provider_error
from offload_core.errors import AuthenticationError, ConfigError
from offload_core.weburls import check_web_url

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_TOKEN_CHARACTERS = 64 << 10


@dataclass(frozen=True)
class ProviderTokens:
    """What a login yields; `repr` shows neither."""

    id_token: str = field(repr=False)
    refresh_token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Provider:
    """Endpoints of a provider, and our client there."""

    issuer: str
    client_id: str
    scopes: tuple[str, ...]
    token_endpoint: str
    authorization_endpoint: str = ""
    device_endpoint: str = ""
    revocation_endpoint: str = ""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of the command, for proxies."""

    @property
    def shown(self) -> str:
        """Name for sentences."""
        return f"the identity provider {self.issuer}"

    async def ask_tokens(self, form: Mapping[str, str]) -> WebAnswer:
        """Call the token endpoint as our public client.

        Raises:
            AuthenticationError: no answer.
        """
        return await call_json(
            self.token_endpoint,
            who=self.shown,
            environment=self.environment,
            form={"client_id": self.client_id, **form},
        )

    async def revoke(self, refresh_token: str) -> bool:
        """End a refresh token; False when the provider offers no way to.

        Raises:
            AuthenticationError: no answer, or it refuses.
        """
        if not self.revocation_endpoint:
            return False
        answer = await call_json(
            self.revocation_endpoint,
            who=self.shown,
            environment=self.environment,
            form={
                "client_id": self.client_id,
                "token": refresh_token,
                "token_type_hint": "refresh_token",
            },
            wants_object=False,
        )
        if not answer.ok:
            raise provider_error(answer, self.shown)
        return True

    def tokens(self, answer: WebAnswer, *, nonce: str = "", refresh: str = "") -> ProviderTokens:
        """Return the tokens of an answer.

        Args:
            answer: of the token endpoint, a good one.
            nonce: that the identity token must repeat; empty for none.
            refresh: the refresh token so far; it stays when there is no new one.

        Raises:
            AuthenticationError: there is no identity token, or it is for another login.
        """
        token = answer.text("id_token")
        if not token or len(token) > MAX_TOKEN_CHARACTERS:
            raise AuthenticationError(f"{self.shown} sends no identity token")
        if nonce and _claims(token).get("nonce") != nonce:
            raise AuthenticationError(f"{self.shown} sends a token of another login")
        return ProviderTokens(token, answer.text("refresh_token") or refresh)


async def discover(
    issuer: str, client_id: str, scopes: tuple[str, ...], environment: Mapping[str, str]
) -> Provider:
    """Return the endpoints that a provider publishes.

    Raises:
        AuthenticationError: it does not answer, or speaks for another issuer.
        ConfigError: the URL cannot be called safely.
    """
    who = f"the identity provider {issuer}"
    url = issuer.rstrip("/") + "/.well-known/openid-configuration"
    answer = await call_json(url, who=who, environment=environment)
    if not answer.ok or answer.text("issuer") != issuer:
        raise AuthenticationError(f"{who} publishes no description of itself")
    endpoints = {
        name: _endpoint(answer, name, who)
        for name in (
            "token_endpoint",
            "authorization_endpoint",
            "device_authorization_endpoint",
            "revocation_endpoint",
        )
    }
    if not endpoints["token_endpoint"]:
        raise AuthenticationError(f"{who} names no token endpoint")
    return Provider(
        issuer=issuer,
        client_id=client_id,
        scopes=scopes,
        token_endpoint=endpoints["token_endpoint"],
        authorization_endpoint=endpoints["authorization_endpoint"],
        device_endpoint=endpoints["device_authorization_endpoint"],
        revocation_endpoint=endpoints["revocation_endpoint"],
        environment=environment,
    )


def _endpoint(answer: WebAnswer, name: str, who: str) -> str:
    url = answer.text(name)
    try:
        return check_web_url(url) if url else ""
    except ConfigError as error:
        raise AuthenticationError(f"{who} names an unsafe {name}") from error


def _claims(token: str) -> dict[str, Any]:
    """Return what a token says; it came from its issuer over TLS, the gateway verifies it."""
    try:
        part = token.split(".")[1]
        value = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, IndexError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

"""How a person logs in: in a browser of this machine, or with a code that is entered elsewhere."""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING

from offload_client.identity import Origin, load_identity
from offload_client.oidc.browser import browser_login
from offload_client.oidc.device import device_login
from offload_client.oidc.exchange import describe_login, exchange
from offload_client.oidc.provider import Provider, discover
from offload_core.errors import AuthenticationError, ConfigError
from offload_core.trust import fetch_ca

if TYPE_CHECKING:
    from collections.abc import Mapping

    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.oidc.provider import ProviderTokens
    from offload_proto.v1.identity_service_pb2 import ExchangeResponse


class Way(enum.Enum):
    """How to log in."""

    ANY = "any"
    BROWSER = "browser"
    DEVICE = "device"


async def known_ca(invocation: Invocation, gateway: str, fingerprint: str) -> bytes:
    """Return the PEM of a gateway's CA: of the fingerprint, else of the last login there.

    Raises:
        ConfigError: neither is known.
        AuthenticationError: the gateway has another CA.
        GatewayUnreachableError: nothing answers.
    """
    if fingerprint:
        return await fetch_ca(gateway, fingerprint)
    try:
        return load_identity(invocation, gateway, ended_too=True).keys.ca_pem
    except AuthenticationError as error:
        raise ConfigError(
            f"the CA of the gateway at {gateway} is not known yet",
            hint="give its fingerprint with --ca, or a token of the gateway with --token; "
            "'offload-builder identity show' prints the fingerprint",
        ) from error


async def person_login(
    invocation: Invocation, gateway: str, ca_pem: bytes, way: Way
) -> tuple[StoredIdentity, ExchangeResponse]:
    """Log a person in at the provider that the gateway names.

    Raises:
        ConfigError: the gateway names none, or it cannot do this.
        AuthenticationError: provider or gateway refuse the login.
        AccessDeniedError: no rule of the gateway matches.
    """
    told = await describe_login(gateway, ca_pem)
    if not told.HasField("person"):
        raise ConfigError(
            f"the gateway at {gateway} names no identity provider for people",
            hint=f"log in with a token: offload login https://{gateway} --token TOKEN",
        )
    person = told.person
    provider = await discover(
        person.issuer, person.client_id, tuple(person.scopes), invocation.environment
    )
    tokens = await _tokens(invocation, provider, way)
    origin = Origin(
        "person",
        person.issuer,
        client_id=person.client_id,
        scopes=tuple(person.scopes),
        refresh_token=tokens.refresh_token,
    )
    return await exchange(gateway, ca_pem, tokens.id_token, origin)


async def _tokens(invocation: Invocation, provider: Provider, way: Way) -> ProviderTokens:
    in_browser = way is Way.BROWSER or (
        way is Way.ANY
        and bool(provider.authorization_endpoint)
        and (has_display(invocation.environment) or not provider.device_endpoint)
    )
    endpoint = provider.authorization_endpoint if in_browser else provider.device_endpoint
    if not endpoint:
        kind = "a browser" if in_browser else "a code that is entered elsewhere"
        raise ConfigError(f"{provider.shown} has no login with {kind}")
    if in_browser:
        return await browser_login(provider, invocation.err, _open_page)
    return await device_login(provider, invocation.err)


def has_display(environment: Mapping[str, str]) -> bool:
    """Return whether a browser on this machine is in front of the person."""
    if environment.get("SSH_CONNECTION") or environment.get("SSH_TTY"):
        return False
    if sys.platform in ("darwin", "win32") or environment.get("BROWSER"):
        return True
    return bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def _open_page(url: str) -> bool:
    import webbrowser

    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False

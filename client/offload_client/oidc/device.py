"""Login with a code that a person types in elsewhere, for machines without a browser (RFC 8628)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from offload_client.oidc.webcalls import call_json, provider_error
from offload_core.errors import AuthenticationError, ConfigError
from offload_core.weburls import check_web_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_client.oidc.provider import Provider, ProviderTokens

GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DEFAULT_INTERVAL_SECONDS = 5.0
"""RFC 8628, section 3.2."""
SLOW_DOWN_SECONDS = 5.0
"""RFC 8628, section 3.5."""
MAX_WAIT_SECONDS = 1800.0
MAX_INTERVAL_SECONDS = 60.0
MAX_FAILURES = 4


async def device_login(provider: Provider, show: Callable[[str], None]) -> ProviderTokens:
    """Show a code and wait until somebody has confirmed it.

    Args:
        provider: with a device endpoint.
        show: prints a line for people.

    Raises:
        AuthenticationError: refused, or not confirmed in time.
    """
    answer = await call_json(
        provider.device_endpoint,
        who=provider.shown,
        environment=provider.environment,
        form={"client_id": provider.client_id, "scope": " ".join(provider.scopes)},
    )
    code, user_code = answer.text("device_code"), answer.text("user_code")
    where = answer.text("verification_uri") or answer.text("verification_url")
    if not answer.ok or not (code and user_code and where):
        raise provider_error(answer, provider.shown)
    show(f"Open {_safe(where)} and enter the code {_printable(user_code)}")
    if complete := answer.text("verification_uri_complete"):
        show(f"or open {_safe(complete)}")
    lasts = min(_seconds(answer.body.get("expires_in"), MAX_WAIT_SECONDS), MAX_WAIT_SECONDS)
    interval = _seconds(answer.body.get("interval"), DEFAULT_INTERVAL_SECONDS)
    try:
        async with asyncio.timeout(lasts):
            return await _poll(provider, code, interval)
    except TimeoutError as error:
        raise AuthenticationError(
            f"nobody has confirmed the code within {lasts / 60:.0f} minutes",
            hint="run the login again",
        ) from error


async def _poll(provider: Provider, code: str, interval: float) -> ProviderTokens:
    failures = 0
    while True:
        await asyncio.sleep(interval)
        try:
            answer = await provider.ask_tokens({"grant_type": GRANT, "device_code": code})
        except AuthenticationError:
            # A connection that broke is no answer (RFC 8628, section 3.5).
            failures += 1
            if failures > MAX_FAILURES:
                raise
            interval = min(interval * 2, MAX_INTERVAL_SECONDS)
            continue
        if answer.ok:
            return provider.tokens(answer)
        match answer.text("error"):
            case "authorization_pending":
                pass
            case "slow_down":
                interval = min(interval + SLOW_DOWN_SECONDS, MAX_INTERVAL_SECONDS)
            case "expired_token":
                raise AuthenticationError("the code has expired", hint="run the login again")
            case _:
                raise provider_error(answer, provider.shown)


def _seconds(value: object, default: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        return default
    return float(value)


def _safe(url: str) -> str:
    try:
        return check_web_url(url)
    except ConfigError as error:
        raise AuthenticationError("the identity provider sends an unsafe address") from error


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:40])

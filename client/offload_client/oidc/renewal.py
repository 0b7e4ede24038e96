"""Who a command acts as where an identity provider is behind the login; renewed in silence."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from offload_client.identity import Origin, identity_folder, load_identity, save_identity
from offload_client.oidc.citokens import find_source
from offload_client.oidc.exchange import describe_login, exchange
from offload_client.oidc.provider import discover
from offload_client.oidc.webcalls import provider_error
from offload_client.settings import pinned_ca
from offload_core.errors import AuthenticationError, ConfigError
from offload_core.trust import fetch_ca

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.oidc.citokens import TokenSource
    from offload_proto.v1.identity_service_pb2 import ExchangeResponse

LOCK_SECONDS = 30.0
_LOCK_POLL_SECONDS = 0.1


async def pipeline_login(
    gateway: str, ca_pem: bytes, source: TokenSource
) -> tuple[StoredIdentity, ExchangeResponse]:
    """Log in with a token of the system that runs this job.

    Raises:
        AuthenticationError: there is no token, or the gateway refuses it.
        AccessDeniedError: no rule of the gateway matches it.
        ConfigError: the gateway names no audience.
    """
    told = await describe_login(gateway, ca_pem)
    if not told.audience:
        raise ConfigError(
            f"the gateway at {gateway} takes no tokens of pipelines",
            hint="an administrator can name them, see docs/identity.md",
        )
    token = await source.token(told.audience)
    return await exchange(gateway, ca_pem, token, Origin("pipeline", source.name, job=source.job))


async def automatic_login(
    invocation: Invocation, gateway: str, source: TokenSource
) -> StoredIdentity:
    """Log in without a stored login, as a pipeline does; nothing is written.

    Raises:
        OffloadError: as `pipeline_login`, or the gateway's CA is not known.
    """
    fingerprint = pinned_ca(invocation, gateway)
    if not fingerprint:
        raise AuthenticationError(
            f"you are not logged in at {gateway}, and its CA is not known",
            hint="set OFFLOAD_CA, or gateway_ca in offload.toml, to the fingerprint that "
            "'offload-builder identity show' prints",
        )
    ca_pem = await fetch_ca(gateway, fingerprint)
    identity, _ = await pipeline_login(gateway, ca_pem, source)
    return identity


async def renewed(invocation: Invocation, gateway: str, identity: StoredIdentity) -> StoredIdentity:
    """Return a fresh identity for one that a provider stands behind, and store it.

    Raises:
        AuthenticationError: the provider no longer vouches for it; the login is over.
        OffloadError: provider or gateway cannot be asked; the old one may still work.
    """
    origin = identity.origin
    if origin is None:
        raise AuthenticationError("this login is renewed by the gateway alone")
    async with _alone(invocation, gateway):
        with contextlib.suppress(AuthenticationError):
            # Another command may have done it while we waited for our turn.
            stored = load_identity(invocation, gateway, ended_too=True)
            if stored.expires_at > identity.expires_at:
                return stored
            identity, origin = stored, stored.origin or origin
        if origin.kind == "pipeline":
            source = find_source(invocation)
            if source is None:
                raise AuthenticationError("this job has no token of an identity provider any more")
            fresh, _ = await pipeline_login(gateway, identity.keys.ca_pem, source)
        else:
            fresh = await _refresh(invocation, gateway, identity, origin)
        with contextlib.suppress(ConfigError):
            save_identity(invocation, gateway, fresh)
        return fresh


async def end_renewal(invocation: Invocation, origin: Origin) -> None:
    """Have a provider end the refresh token of a login that is given up, if there is one.

    Raises:
        AuthenticationError: it cannot be asked, refuses, or offers no way to.
        ConfigError: its URL cannot be called safely.
    """
    if not origin.refresh_token:
        return
    provider = await discover(
        origin.source, origin.client_id, origin.scopes, invocation.environment
    )
    if not await provider.revoke(origin.refresh_token):
        raise AuthenticationError(f"{provider.shown} offers no way to end a login")


async def _refresh(
    invocation: Invocation, gateway: str, identity: StoredIdentity, origin: Origin
) -> StoredIdentity:
    if not origin.refresh_token:
        raise AuthenticationError("your login has ended, and your identity provider renews none")
    provider = await discover(
        origin.source, origin.client_id, origin.scopes, invocation.environment
    )
    answer = await provider.ask_tokens(
        {"grant_type": "refresh_token", "refresh_token": origin.refresh_token}
    )
    if not answer.ok:
        raise provider_error(answer, provider.shown)
    tokens = provider.tokens(answer, refresh=origin.refresh_token)
    kept = dataclasses.replace(origin, refresh_token=tokens.refresh_token)
    if kept != origin:
        # The old one may be of no use from now on, also when the gateway does not answer.
        with contextlib.suppress(ConfigError):
            save_identity(invocation, gateway, dataclasses.replace(identity, origin=kept))
    fresh, _ = await exchange(gateway, identity.keys.ca_pem, tokens.id_token, kept)
    return fresh


@asynccontextmanager
async def _alone(invocation: Invocation, gateway: str) -> AsyncIterator[None]:
    """Let one command renew at a time: many providers take each refresh token only once."""
    folder = identity_folder(invocation, gateway)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(folder / "renewal.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        # A home that cannot be written: nothing can be kept there, so nothing is shared.
        yield
        return
    try:
        await _lock(file)
        yield
    finally:
        os.close(file)


async def _lock(file: int) -> None:
    try:
        async with asyncio.timeout(LOCK_SECONDS):
            while True:
                try:
                    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_POLL_SECONDS)
    except TimeoutError as error:
        raise AuthenticationError(
            f"another command has been renewing the login for {LOCK_SECONDS:.0f} s",
            hint="try again; when that does not help, end the other command",
        ) from error

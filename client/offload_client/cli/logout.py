"""`offload logout`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from offload_client.buildx.renewal import TURN_SECONDS, alone, take_back
from offload_client.cli.process import run_async
from offload_client.identity import forget_identity, load_identity
from offload_client.settings import resolve_settings
from offload_core.errors import AuthenticationError, ConfigError

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.identity import Origin
    from offload_client.invocation import Invocation


@click.command()
@click.argument("url", metavar="[URL]", required=False)
@click.pass_obj
def logout(invocation: Invocation, url: str | None) -> int:
    """Forget the login at a gateway, the configured one by default.

    An identity provider that renews the login is asked to end that as well.
    """
    gateway = resolve_settings(invocation, gateway=url).gateway
    # A renewal in the background must not bring back what is removed here.
    with alone(invocation, wait_seconds=TURN_SECONDS):
        origin = _origin(invocation, gateway)
        known = forget_identity(invocation, gateway)
        names = take_back(invocation, gateway)
    if known:
        invocation.out(f"Removed the login at {gateway}")
    else:
        invocation.out(f"Not logged in at {gateway}")
    for name in names:
        invocation.out(f'Removed the certificate of the builder "{name}"')
    if origin is None or not origin.refresh_token:
        return 0
    return _end_renewal(invocation, origin)


def _origin(invocation: Invocation, gateway: str) -> Origin | None:
    """Return what is behind a login; None when nothing is, or it cannot be read."""
    with contextlib.suppress(AuthenticationError):
        return load_identity(invocation, gateway, ended_too=True).origin
    return None


def _end_renewal(invocation: Invocation, origin: Origin) -> int:
    from offload_client.oidc.renewal import end_renewal

    async def run(_connections: Connections) -> None:
        try:
            await end_renewal(invocation, origin)
        except (AuthenticationError, ConfigError) as error:
            invocation.err(f"warning: {error.message}; what renews the login stays good there")

    return run_async(invocation, run)

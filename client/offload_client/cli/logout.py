"""`offload logout`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.identity import forget_identity
from offload_client.settings import resolve_settings

if TYPE_CHECKING:
    from offload_client.invocation import Invocation


@click.command()
@click.argument("url", metavar="[URL]", required=False)
@click.pass_obj
def logout(invocation: Invocation, url: str | None) -> int:
    """Forget the login at a gateway, the configured one by default."""
    gateway = resolve_settings(invocation, gateway=url).gateway
    if forget_identity(invocation, gateway):
        invocation.out(f"Removed the login at {gateway}")
    else:
        invocation.out(f"Not logged in at {gateway}")
    return 0

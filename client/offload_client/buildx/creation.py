"""Making a builder: its certificate files, and what buildx knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_client.buildx.builders import (
    builder_folder,
    forget_builder,
    note_due,
    save_builder,
)
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from offload_client.buildx.builders import Builder
    from offload_client.buildx.registration import Registration
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


async def create_builder(
    invocation: Invocation,
    connections: Connections,
    registration: Registration,
    builder: Builder,
    *,
    use: bool,
) -> None:
    """Make a builder, or replace ours of the same name.

    Args:
        invocation: the command.
        connections: for the login that the builder gets its certificate from.
        registration: what buildx knows.
        builder: the one to make.
        use: also choose it.

    Raises:
        AuthenticationError: nobody is logged in at its gateway.
        UsageError: buildx has another builder of this name.
        ConfigError: a file cannot be written, or buildx refuses the builder.
    """
    identity = await connections.identity(invocation, builder.gateway)
    registration.check(builder.name)
    before = builder_folder(invocation, builder.name).exists()
    save_builder(invocation, builder, identity)
    try:
        registration.add(builder, use=use)
    except OffloadError:
        if not before:
            forget_builder(invocation, builder.name)
        raise
    note_due(invocation)

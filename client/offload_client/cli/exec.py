"""`offload exec`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offload_client.buildx.execution import run_beside
from offload_client.buildx.store import BuildxStore
from offload_client.buildx.tunnel import Tunnel
from offload_client.cli.options import gateway_option, project_option
from offload_client.cli.process import run_async
from offload_client.settings import resolve_settings
from offload_core.errors import OffloadError

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation

BUILDER = "offload"


# Flags behind the program's name are the program's.
@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
@project_option
@gateway_option
@click.pass_obj
def execute(
    invocation: Invocation, command: tuple[str, ...], project: str | None, gateway: str | None
) -> int:
    """Run a BuildKit client on the pool.

    While COMMAND runs, BUILDKIT_HOST leads to the pool, and docker buildx and docker compose build
    there as well. The address is a socket that only you can open. Signals and the exit code are
    those of COMMAND.

    \b
    Examples:
      offload exec -- buildctl build --frontend dockerfile.v0 --local context=. --local dockerfile=.
      offload exec -- docker compose build
      offload exec --project shop -- make images
    """
    settings = resolve_settings(invocation, gateway=gateway, project=project)
    code = 0

    async def run(connections: Connections) -> None:
        nonlocal code

        async def identity() -> StoredIdentity:
            return await connections.identity(invocation, settings.gateway)

        def failed(error: OffloadError | OSError) -> None:
            sentence = error.message if isinstance(error, OffloadError) else str(error)
            sentence = sentence or "it does not answer"
            invocation.err(f"ERROR: the pool at {settings.gateway} is not reached: {sentence}")

        # Who is not logged in hears it before anything runs.
        await identity()
        with tempfile.TemporaryDirectory(prefix="offload-") as folder:
            socket = Path(folder) / "buildkit.sock"
            environment = _environment(invocation, Path(folder), socket)
            async with Tunnel(socket, settings.gateway, settings.project, identity, failed):
                code = await run_beside(invocation, command, environment)

    return run_async(invocation, run) or code


def _environment(invocation: Invocation, folder: Path, socket: Path) -> dict[str, str]:
    """Return the environment of the command, with a buildx of its own whose builder is the pool."""
    address = f"unix://{socket}"
    environment = dict(invocation.environment)
    mine = BuildxStore(environment).node_id()
    environment |= {
        "BUILDKIT_HOST": address,
        "BUILDX_BUILDER": BUILDER,
        "BUILDX_CONFIG": os.fspath(folder / "buildx"),
    }
    store = BuildxStore(environment)
    store.save(BUILDER, endpoint=address, options={})
    store.choose(BUILDER)
    if mine:
        # Without it BuildKit would not recognise files that it has got from here before.
        store.adopt(mine)
    return environment

"""`offload login`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.process import run_async
from offload_client.identity import login as exchange_token
from offload_client.identity import save_identity
from offload_client.settings import remember_gateway
from offload_core.errors import UsageError
from offload_core.trust import join_address, split_address
from offload_proto.v1.identity_service_pb2 import Role

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


MAX_TOKEN_BYTES = 64 << 10


@click.command()
@click.argument("url", metavar="URL")
@click.option("--token", metavar="TOKEN", help="The token that an administrator gave you.")
@click.option("--token-stdin", is_flag=True, help="Take the token from standard input.")
@click.pass_obj
def login(invocation: Invocation, url: str, token: str | None, *, token_stdin: bool) -> int:
    """Log in at the gateway at URL; later commands use it.

    \b
    Examples:
      offload login https://gateway.example:7443 --token ofl_...
      offload login https://gateway.example:7443 --token-stdin < token
    """
    if token_stdin == (token is not None):
        raise UsageError("give the token either with --token or with --token-stdin")
    if token is None:
        try:
            with open(invocation.stdin, "rb", closefd=False) as stream:
                token = stream.read(MAX_TOKEN_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise UsageError(f"cannot read the token: {error.strerror}") from error
    secret = token.strip()
    gateway = join_address(*split_address(url))

    async def run(_connections: Connections) -> None:
        identity, reply = await exchange_token(gateway, secret)
        save_identity(invocation, gateway, identity)
        remember_gateway(invocation, gateway)
        role = Role.Name(reply.role).removeprefix("ROLE_").lower()
        projects = ", ".join(reply.project_ids) or "all"
        invocation.out(f"Logged in at {gateway} as {reply.member} ({role}), projects: {projects}")

    return run_async(invocation, run)

"""`offload login`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.buildx.renewal import hand_over
from offload_client.ci.system import in_pipeline
from offload_client.cli.process import run_async
from offload_client.identity import login as exchange_token
from offload_client.identity import save_identity
from offload_client.settings import pinned_ca, remember_gateway
from offload_core.errors import UsageError
from offload_core.trust import check_fingerprint, join_address, split_address
from offload_proto.v1.identity_service_pb2 import Role

if TYPE_CHECKING:
    from collections.abc import Iterable

    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation


MAX_TOKEN_BYTES = 64 << 10


@click.command()
@click.argument("url", metavar="URL")
@click.option("--token", metavar="TOKEN", help="The token that an administrator gave you.")
@click.option("--token-stdin", is_flag=True, help="Take the token from standard input.")
@click.option(
    "--oidc",
    is_flag=True,
    help="Log in with the identity provider: with the token of the pipeline that runs this, else "
    "in a browser. The default without a token.",
)
@click.option("--browser", is_flag=True, help="Log in at the identity provider in a browser.")
@click.option("--device", is_flag=True, help="Log in with a code that is entered elsewhere.")
@click.option(
    "--ca",
    metavar="FINGERPRINT",
    help="SHA-256 of the gateway's CA, as 'offload-builder identity show' prints it; needed once "
    "for a login without a token of the gateway.",
)
@click.pass_obj
def login(
    invocation: Invocation,
    url: str,
    token: str | None,
    *,
    token_stdin: bool,
    oidc: bool,
    browser: bool,
    device: bool,
    ca: str | None,
) -> int:
    """Log in at the gateway at URL; later commands use it.

    \b
    Examples:
      offload login https://gateway.example:7443 --ca 4f1c...
      offload login https://gateway.example:7443 --token ofl_...
      offload login https://gateway.example:7443 --token-stdin < token
    """
    ways = [token is not None, token_stdin, oidc or browser or device]
    if sum(ways) > 1 or (browser and device):
        raise UsageError("choose one way to log in: a token, or the identity provider")
    gateway = join_address(*split_address(url))
    if token is None and not token_stdin:
        return run_async(
            invocation,
            lambda _: _at_provider(invocation, gateway, ca, browser=browser, device=device),
        )
    if ca is not None:
        raise UsageError("a token of the gateway names its CA itself; leave --ca out")
    secret = _token_of_input(invocation) if token is None else token.strip()

    async def run(_connections: Connections) -> None:
        identity, reply = await exchange_token(gateway, secret)
        _keep(invocation, gateway, identity)
        remember_gateway(invocation, gateway)
        _tell(invocation, gateway, reply.member, reply.role, reply.project_ids)

    return run_async(invocation, run)


async def _at_provider(
    invocation: Invocation, gateway: str, ca: str | None, *, browser: bool, device: bool
) -> None:
    from offload_client.oidc.citokens import find_source, missing_source
    from offload_client.oidc.person import Way, known_ca, person_login
    from offload_client.oidc.renewal import pipeline_login

    fingerprint = check_fingerprint(ca) if ca is not None else pinned_ca(invocation, gateway)
    ca_pem = await known_ca(invocation, gateway, fingerprint)
    source = None if browser or device else find_source(invocation)
    if source is not None:
        identity, reply = await pipeline_login(gateway, ca_pem, source)
    else:
        if not (browser or device) and in_pipeline(invocation.environment):
            raise UsageError(
                "this job has no token of an identity provider",
                hint=missing_source(invocation)
                or "set OFFLOAD_ID_TOKEN, OFFLOAD_ID_TOKEN_FILE or OFFLOAD_ID_TOKEN_COMMAND, or "
                "give a token of the gateway",
            )
        way = Way.BROWSER if browser else Way.DEVICE if device else Way.ANY
        identity, reply = await person_login(invocation, gateway, ca_pem, way)
    _keep(invocation, gateway, identity)
    remember_gateway(invocation, gateway, ca=fingerprint)
    _tell(invocation, gateway, reply.member, reply.role, reply.project_ids)
    if source is not None and reply.identity.rule:
        invocation.out(f'By the rule "{reply.identity.rule}" for {reply.identity.subject}')


def _keep(invocation: Invocation, gateway: str, identity: StoredIdentity) -> None:
    save_identity(invocation, gateway, identity)
    hand_over(invocation, gateway, identity)


def _token_of_input(invocation: Invocation) -> str:
    try:
        with open(invocation.stdin, "rb", closefd=False) as stream:
            return stream.read(MAX_TOKEN_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        raise UsageError(f"cannot read the token: {error.strerror}") from error


def _tell(
    invocation: Invocation,
    gateway: str,
    member: str,
    role: Role.ValueType,
    project_ids: Iterable[str],
) -> None:
    name = Role.Name(role).removeprefix("ROLE_").lower()
    projects = ", ".join(project_ids) or "all"
    invocation.out(f"Logged in at {gateway} as {member} ({name}), projects: {projects}")

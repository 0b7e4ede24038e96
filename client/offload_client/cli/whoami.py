"""`offload whoami`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from offload_client.cli.builds import identity_json
from offload_client.cli.options import gateway_option, pretty_or_json
from offload_client.cli.process import run_async
from offload_client.cli.tables import rfc3339
from offload_client.gateway import GatewayCalls
from offload_client.settings import resolve_settings
from offload_proto.v1.identity_service_pb2 import Role, WhoAmIRequest

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_proto.v1.identity_service_pb2 import WhoAmIResponse


@click.command()
@gateway_option
@pretty_or_json
@click.pass_obj
def whoami(invocation: Invocation, gateway: str | None, output: str) -> int:
    """Show who you are at the gateway, what you may use, and until when."""
    settings = resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        calls = await GatewayCalls.open(invocation, settings, connections)
        me: WhoAmIResponse = await calls.call(calls.identity.WhoAmI, WhoAmIRequest())
        if output == "json":
            invocation.out(json.dumps(_json(settings.gateway, me), indent=2))
        else:
            invocation.out("\n".join(_lines(settings.gateway, me)))

    return run_async(invocation, run)


def _json(gateway: str, me: WhoAmIResponse) -> dict[str, Any]:
    return {
        "gateway": gateway,
        "member": me.member,
        "role": _role(me),
        "projects": list(me.project_ids),
        "valid_until": rfc3339(me.token_expires_at),
        "identity": identity_json(me.identity) if me.HasField("identity") else None,
    }


def _lines(gateway: str, me: WhoAmIResponse) -> list[str]:
    told = me.identity
    lines = {
        "Gateway": gateway,
        "Member": f"{me.member} ({_role(me)})",
        "Projects": ", ".join(me.project_ids) or "all",
        "Valid until": rfc3339(me.token_expires_at) or "it is revoked",
    }
    if me.HasField("identity"):
        lines["Issuer"] = told.issuer
        lines["Subject"] = told.subject
        lines["Rule"] = told.rule
        if told.run_url:
            lines["Run"] = told.run_url
        if told.bound:
            lines["Branch"] = told.branch or "none"
    width = max(map(len, lines)) + 3
    return [f"{name.ljust(width)}{value}" for name, value in lines.items()]


def _role(me: WhoAmIResponse) -> str:
    return Role.Name(me.role).removeprefix("ROLE_").lower()

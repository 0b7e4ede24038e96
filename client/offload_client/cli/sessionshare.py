"""`offload share`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import complete_sessions, settings_of
from offload_client.settings import resolve_settings

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation


@click.command()
@click.argument("session", metavar="SESSION", shell_complete=complete_sessions)
@click.argument("members", metavar="[MEMBER]...", nargs=-1)
@click.option("--remove", is_flag=True, help="They may use it no more, from this moment on.")
@gateway_option
@click.pass_obj
def share(
    invocation: Invocation,
    session: str,
    members: tuple[str, ...],
    gateway: str | None,
    *,
    remove: bool,
) -> int:
    """Let further members of the project use a session; without MEMBER, print who may.

    They use it with 'offload use ID', see all of its containers, images and volumes, and may remove
    them. SESSION is a name, an id or the beginning of one.

    \b
    Examples:
      offload share default anna ben
      offload share default ben --remove
    """
    from offload_client.sessions.attaching import Attachments

    record = next(
        (one for one in Attachments(invocation).records() if session in (one.name, one.session_id)),
        None,
    )
    settings = settings_of(record) if record else resolve_settings(invocation, gateway=gateway)

    async def run(connections: Connections) -> None:
        from offload_client.sessions.gatewaycalls import SessionCalls

        calls = await SessionCalls.open_for(invocation, settings, connections)
        session_id = record.session_id if record else ""
        if not session_id:
            session_id = (await calls.find(session, (await calls.who()).member)).session_id
        if not members:
            found = await calls.get(session_id)
        elif remove:
            found = await calls.share(session_id, remove=members)
        else:
            found = await calls.share(session_id, add=members)
        shared = ", ".join(found.shared_with)
        may = f"{found.owner} and {shared} may use" if shared else f"Only {found.owner} may use"
        invocation.out(f'{may} the session "{found.spec.name}"')
        if members and not remove:
            invocation.out(f"They run: offload use {found.session_id}")

    return run_async(invocation, run)

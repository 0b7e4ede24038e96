"""`offload use`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import session_argument, settings_of
from offload_client.cli.sessionstart import tell_context
from offload_client.settings import resolve_settings
from offload_core.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.sessions.attaching import Attachments
    from offload_client.sessions.records import SessionRecord


@click.command()
@session_argument()
@click.option("--name", metavar="NAME", help="What the session is called on this machine.")
@click.option("--no-use", is_flag=True, help="Leave the docker context that is in use.")
@gateway_option
@click.pass_obj
def use(
    invocation: Invocation,
    session: str | None,
    name: str | None,
    gateway: str | None,
    *,
    no_use: bool,
) -> int:
    """Let docker use a session that runs: of this machine, of another one of yours, or shared.

    SESSION is a name, an id or the beginning of one, as 'offload ps' lists them. Without it docker
    uses the session of this machine again, for example after 'docker context use default'. A paused
    session wakes. Ports and directories of a session belong to the machine that started the
    container.

    \b
    Examples:
      offload use
      offload use 3f9a
      offload use review --name anna
    """
    from offload_client.sessions.attaching import Attachments

    local = Attachments(invocation)
    record = _here(local, session)
    if record is None and session is None:
        raise NotFoundError("no session is in use on this machine", hint="run 'offload start'")
    if record is not None and name is not None and name != record.name:
        raise UsageError(f'this machine uses the session already, as "{record.name}"')

    async def run(connections: Connections) -> None:
        if record is not None:
            with local.alone(record.name):
                now = local.record(record.name)
                if now is None or now.session_id != record.session_id:
                    raise NotFoundError(f'the session "{record.name}" was stopped meanwhile')
                await _woken(invocation, connections, now)
                await local.revive(now)
                former = None if no_use else local.use(now)
            tell_context(invocation, local, now, former)
            return
        from offload_client.sessions.gatewaycalls import SessionCalls

        settings = resolve_settings(invocation, gateway=gateway)
        calls = await SessionCalls.open_for(invocation, settings, connections)
        me = (await calls.who()).member
        found = await calls.find(session or "", me)
        known = local.of_session(found.session_id)
        here = known.name if known else name or local.free_name(found.spec.name, found.owner)
        with local.alone(here), local.prepared(here) as helper:
            if known is None and local.record(here) is not None:
                raise UsageError(
                    f'this machine has another session "{here}"; choose another --name'
                )
            opened = (await calls.open(found.session_id)).session
            if known is None:
                fresh = await local.attach(
                    here, opened, settings.gateway, helper, own=opened.owner == me
                )
            else:
                fresh = known
                await local.revive(known)
            former = None if no_use else local.use(fresh)
        whose = "" if opened.owner == me else f" of {opened.owner}"
        invocation.out(f'This machine uses the session "{opened.spec.name}"{whose}')
        tell_context(invocation, local, fresh, former)

    return run_async(invocation, run)


def _here(local: Attachments, session: str | None) -> SessionRecord | None:
    records = local.records()
    if session is None:
        return local.chosen(None) if records else None
    return next((one for one in records if session in (one.name, one.session_id)), None)


async def _woken(invocation: Invocation, connections: Connections, record: SessionRecord) -> None:
    from offload_client.sessions.gatewaycalls import SessionCalls

    calls = await SessionCalls.open_for(invocation, settings_of(record), connections)
    try:
        await calls.open(record.session_id)
    except NotFoundError as error:
        clear = f"clear it away with: offload stop {record.name}"
        raise NotFoundError(error.message, hint=clear) from error

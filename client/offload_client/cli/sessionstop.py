"""`offload stop`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import agreed, can_ask, session_argument, settings_of
from offload_core.errors import (
    AuthenticationError,
    ConfigError,
    GatewayUnreachableError,
    NodeLostError,
    NotFoundError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.sessions.attaching import Attachments
    from offload_client.sessions.gatewaycalls import SessionCalls
    from offload_client.sessions.records import SessionRecord


@click.command()
@session_argument(many=True)
@click.option(
    "-f", "--force", is_flag=True, help="Do not ask, and clean up here if the gateway is away."
)
@click.option("-a", "--all", "everything", is_flag=True, help="All sessions of this machine.")
@click.pass_obj
def stop(
    invocation: Invocation, sessions: tuple[str, ...], *, force: bool, everything: bool
) -> int:
    """Stop sessions and remove everything of them, after asking.

    Containers, images and volumes are removed, and docker uses again what it used before. Without
    SESSION it is the one that docker uses. Somebody else's session, which is shared with you, is
    left and goes on. A session that is gone already is cleared away here.

    \b
    Examples:
      offload stop
      offload stop training -f
      offload stop --all

    Exit codes: 0 also when nothing was to be stopped, 125 nobody can be asked, 7 the gateway is
    away and nothing was changed.
    """
    from offload_client.sessions.attaching import Attachments

    local = Attachments(invocation)
    records = _chosen(local, sessions, everything=everything, force=force)
    if not records:
        invocation.err("No session is in use on this machine.")
        return 0
    own = [record for record in records if record.mine]
    if own and not force and not can_ask(invocation):
        raise UsageError("there is no terminal to ask on; give --force to stop the session")

    async def run(connections: Connections) -> None:
        if own and not force:
            running = await local.containers_running(own)
            if not await agreed(invocation, question(own, running)):
                invocation.err("Nothing was stopped.")
                return
        stopping = Stopping(invocation, connections, local, force=force)
        failures = []
        for record in records:
            try:
                await stopping.stop(record)
            except Exception as error:
                # The others are stopped all the same.
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup("several sessions were not stopped", failures)

    return run_async(invocation, run)


def _chosen(
    local: Attachments, names: Sequence[str], *, everything: bool, force: bool
) -> list[SessionRecord]:
    if everything:
        if names:
            raise UsageError("--all goes without names of sessions")
        return local.records()
    if not names:
        return [local.chosen(None)] if local.records() else []
    found = {}
    for name in names:
        try:
            record = local.chosen(name)
        except ConfigError as error:
            if not force:
                hint = f"forget it here with: offload stop --force {name}"
                raise ConfigError(error.message, hint=hint) from error
            # Which session it was, nobody can tell any more; it is removed when it was idle.
            record = local.unreadable(name)
        found[record.name] = record
    return list(found.values())


def question(records: Sequence[SessionRecord], running: dict[str, int]) -> str:
    """Return what a person is asked before sessions are stopped.

    Args:
        records: of the sessions.
        running: how many containers run in those whose helper knows.
    """
    names = ", ".join(f'"{record.name}"' for record in records)
    noun = "session" if len(records) == 1 else "sessions"
    whose = "Its" if len(records) == 1 else "Their"
    count = sum(running.values())
    verb = f" ({count} of them running)" if count else ""
    return (
        f"WARNING! {whose} containers{verb}, images and volumes will be removed.\n"
        f"Stop the {noun} {names}?"
    )


class Stopping:
    """Stops sessions, one after the other."""

    def __init__(
        self,
        invocation: Invocation,
        connections: Connections,
        local: Attachments,
        *,
        force: bool,
    ) -> None:
        self._invocation = invocation
        self._connections = connections
        self._local = local
        self._force = force

    async def stop(self, record: SessionRecord) -> None:
        """Stop one session and clear it away here.

        Raises:
            OffloadError: it could not be stopped; this machine goes on using it.
        """
        with self._local.alone(record.name):
            if record.session_id:
                # Whoever thinks about the question finds another session of this name, perhaps.
                now = self._local.record(record.name)
                if now is None or now.session_id != record.session_id:
                    self._invocation.out(f'The session "{record.name}" was stopped meanwhile')
                    return
                record = now
            said = await self._at_gateway(record)
            restored = await self._local.detach(record)
        self._invocation.out(said)
        if restored is not None:
            self._invocation.out(f'docker uses the context "{restored or "default"}" again')

    async def _at_gateway(self, record: SessionRecord) -> str:
        if not record.session_id:
            return f'Forgot the session "{record.name}", whose record could not be read'
        if not record.mine:
            return f'Left the session "{record.name}" of {record.owner}; it goes on'
        from offload_client.sessions.gatewaycalls import is_open

        try:
            calls = await self._calls(record)
            # Whoever cannot be stopped keeps the helper.
            session = await calls.get(record.session_id)
            if not is_open(session):
                why = f": {session.reason}" if session.reason else ""
                return f'The session "{record.name}" was gone already{why}'
            for warning in await self._local.quiet(record):
                self._invocation.err(f"WARNING: {warning}")
            await calls.stop(record.session_id)
        except NotFoundError:
            return f'The session "{record.name}" was gone already'
        except NodeLostError as error:
            # The gateway has taken note of it.
            self._invocation.err(f"WARNING: {error.message}")
        except (GatewayUnreachableError, AuthenticationError) as error:
            if not self._force:
                raise type(error)(
                    error.message,
                    hint="nothing was changed; --force forgets the session on this machine",
                ) from error
            self._invocation.err(
                f"WARNING: {error.message}; the session {record.session_id} is removed there when "
                "it was idle for long enough"
            )
            return f'Forgot the session "{record.name}" on this machine'
        return f'Stopped the session "{record.name}"'

    async def _calls(self, record: SessionRecord) -> SessionCalls:
        from offload_client.sessions.gatewaycalls import SessionCalls

        return await SessionCalls.open_for(self._invocation, settings_of(record), self._connections)

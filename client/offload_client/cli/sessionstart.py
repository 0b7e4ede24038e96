"""`offload start`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import click

from offload_client.cli.options import gateway_option, project_option
from offload_client.cli.process import run_async
from offload_client.cli.sessionoptions import Length, settings_of
from offload_client.settings import resolve_settings
from offload_core.errors import GatewayUnreachableError, NotFoundError, UsageError
from offload_core.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.connections import Connections
    from offload_client.invocation import Invocation
    from offload_client.sessions.attaching import Attachments
    from offload_client.sessions.gatewaycalls import SessionCalls
    from offload_client.sessions.records import SessionRecord
    from offload_client.settings import Settings
    from offload_proto.v1.sessions_service_pb2 import Session, SessionSpec


@click.command()
@click.argument("name", metavar="[NAME]", default="default")
@click.option("-g", "--gpu", is_flag=True, help="On a node with a GPU, which the session gets.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="VENDOR/CLASS=NAME",
    help="Device that the session gets; may be given several times.",
)
@click.option(
    "--idle-timeout",
    type=Length(),
    metavar="DURATION",
    help="Pause the session after so long without use (default: the node's).",
)
@click.option(
    "--ttl",
    type=Length(),
    metavar="DURATION",
    help="End the session after so long, whatever it does (default: the node's).",
)
@click.option("--cpus", type=float, metavar="NUMBER", help="Processors (default: the node's).")
@click.option("-m", "--memory", metavar="SIZE", help="Memory, for example 4g.")
@click.option("--disk-size", metavar="SIZE", help="Disk for images, containers and volumes.")
@click.option(
    "--node-label",
    "node_labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Label that the node must have; may be given several times.",
)
@project_option
@gateway_option
@click.option("--no-use", is_flag=True, help="Leave the docker context that is in use.")
@click.option(
    "--timeout",
    type=Length(),
    metavar="DURATION",
    help="Give up when the session is not ready by then (default: wait).",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the session's ID only.")
@click.option(
    "--progress",
    default="auto",
    show_default=True,
    metavar="MODE",
    help="Set type of progress output (auto, none, plain, quiet, rawjson, tty).",
)
@click.pass_obj
def start(
    invocation: Invocation,
    /,
    name: str,
    project: str | None,
    gateway: str | None,
    timeout: float | None,
    progress: str,
    *,
    no_use: bool,
    quiet: bool,
    **wishes: object,
) -> int:
    """Start a docker engine of your own on a node, and let docker use it.

    Docker commands go to it from then on, with ports and directories of this machine. It is paused
    when nobody uses it, and removed when nobody comes back; 'offload stop' removes it at once.
    When a session of this name runs already, this machine uses that one.

    \b
    Examples:
      offload start
      offload start training --gpu --idle-timeout 30m
      offload start --cpus 4 --memory 8g --node-label zone=eu
      docker run --rm -p 8081:80 -v "$PWD:/srv" nginx
      offload stop

    Exit codes: 0 ready, 4 not allowed, 5 no node has what is asked for, 6 no room, or not ready in
    time, 7 the gateway or the node is away, 130 canceled.
    """
    from offload_client.progress.display import parse_progress
    from offload_client.sessions.spec import make_spec

    spec = make_spec(name, wishes)
    mode = parse_progress("quiet" if quiet and progress == "auto" else progress)
    settings = resolve_settings(invocation, gateway=gateway, project=project)

    async def run(connections: Connections) -> None:
        starting = Starting(invocation, connections, settings, spec, mode)
        await starting.run(timeout, use=not no_use, quiet=quiet)

    return run_async(invocation, run)


class Starting:
    """One start of a session."""

    def __init__(
        self,
        invocation: Invocation,
        connections: Connections,
        settings: Settings,
        spec: SessionSpec,
        mode: str,
    ) -> None:
        from offload_client.sessions.attaching import Attachments

        self._invocation = invocation
        self._connections = connections
        self._settings = settings
        self._spec = spec
        self._mode = mode
        self._local: Attachments = Attachments(invocation)

    async def run(self, timeout: float | None, *, use: bool, quiet: bool) -> None:
        """Start or find the session, let this machine use it, and say what comes next."""
        began = time.monotonic()
        name = self._spec.name
        with self._local.alone(name):
            record = self._local.record(name)
            known = None
            if record is not None:
                known = await self._still_there(record)
            if record is not None and known is not None:
                self._check_same(record)
                await self._local.revive(record)
                session, news = known, f'Session "{name}" runs already'
            else:
                record, session, found = await self._new(timeout)
                news = f'Session "{name}" runs already' if found else f'Session "{name}" is ready'
            former = self._local.use(record) if use else None
        if quiet:
            self._invocation.out(session.session_id)
        else:
            self._tell(news, session, time.monotonic() - began)
        tell_context(self._invocation, self._local, record, former, quiet=quiet)

    async def _calls(self, settings: Settings) -> SessionCalls:
        from offload_client.sessions.gatewaycalls import SessionCalls

        return await SessionCalls.open_for(self._invocation, settings, self._connections)

    async def _still_there(self, record: SessionRecord) -> Session | None:
        """Return the session of a record, woken; None after clearing away one that is gone."""
        calls = await self._calls(settings_of(record))
        try:
            return (await calls.open(record.session_id)).session
        except NotFoundError as error:
            self._invocation.err(error.message)
        await self._local.detach(record)
        return None

    def _check_same(self, record: SessionRecord) -> None:
        if (record.gateway, record.project_id) != (
            self._settings.gateway,
            self._settings.project,
        ):
            raise UsageError(
                f'the session "{record.name}" runs in the project "{record.project_id}" '
                f"at {record.gateway}",
                hint="give another name, or stop it",
            )
        asked_for = self._spec.ListFields()
        if len(asked_for) > 1:
            self._invocation.err(
                f'WARNING: "{record.name}" keeps what it was started with; '
                "stop it first to start it with other options"
            )

    async def _new(self, timeout: float | None) -> tuple[SessionRecord, Session, bool]:
        """Return the record of a session that is started, or that runs already elsewhere."""
        name = self._spec.name
        with self._local.prepared(name) as helper:
            calls = await self._calls(self._settings)
            me, sessions = await asyncio.gather(
                calls.who(), calls.listed(project=self._settings.project)
            )
            running = _of_name(sessions, name, me.member)
            if running is not None:
                session = (await calls.open(running.session_id)).session
            else:
                session = await self._started(calls, timeout)
            try:
                record = await self._local.attach(
                    name, session, self._settings.gateway, helper, own=True
                )
            except BaseException:
                if running is None:
                    await self._given_up(calls, session.session_id)
                raise
        return record, session, running is not None

    async def _given_up(self, calls: SessionCalls, session_id: str) -> None:
        from offload_core.aio import finish

        await finish(self._undo(calls, session_id), 10.0)

    async def _undo(self, calls: SessionCalls, session_id: str) -> None:
        try:
            await calls.stop(session_id, timeout=10.0)
        except (GatewayUnreachableError, NotFoundError):
            # It is paused when nobody uses it, and then removed.
            self._invocation.err(f"WARNING: the session {session_id} ends later by itself")

    async def _started(self, calls: SessionCalls, timeout: float | None) -> Session:
        from offload_client.progress.display import finish_display, make_display
        from offload_client.sessions.startsteps import StartSteps

        with (
            make_display(
                self._mode, self._invocation.stderr, self._invocation.environment, doing="Starting"
            ) as display,
            StartSteps(display) as steps,
        ):
            try:
                async with asyncio.timeout(timeout):
                    reply = await calls.start(
                        self._settings.project,
                        self._spec,
                        on_queued=steps.queued,
                        on_starting=steps.starting,
                    )
            except TimeoutError:
                from offload_core.errors import QueueTimeoutError

                raise QueueTimeoutError(
                    f"the session was not ready within {format_duration(timeout or 0)}"
                    + (f": {steps.reason}" if steps.reason else ""),
                    hint="give it longer with --timeout",
                ) from None
            try:
                steps.ready()
                await finish_display(display, None)
            except BaseException:
                await self._given_up(calls, reply.session.session_id)
                raise
        return reply.session

    def _tell(self, news: str, session: Session, seconds: float) -> None:
        where = f" on node {session.node_id}" if session.node_id else ""
        with_what = f" with {', '.join(session.devices)}" if session.devices else ""
        self._invocation.out(f"{news}{where}{with_what} ({format_duration(seconds)})")


def _of_name(sessions: Sequence[Session], name: str, member: str) -> Session | None:
    from offload_client.sessions.gatewaycalls import is_open

    for session in sessions:
        if session.owner == member and session.spec.name == name and is_open(session):
            return session
    return None


def tell_context(
    invocation: Invocation,
    local: Attachments,
    record: SessionRecord,
    former: str | None,
    *,
    quiet: bool = False,
) -> None:
    """Say which docker context leads to a session, and what keeps docker from using it.

    Args:
        invocation: the command.
        local: the sessions here.
        record: of the session.
        former: context that was in use before; None when ours was not chosen.
        quiet: warnings only.
    """
    overriding = local.contexts.overriding(record.context) if former is not None else None
    if overriding is not None:
        invocation.err(
            f"WARNING: {overriding.variable}={overriding.value} is set, so docker does not use "
            f"the session; run: unset {overriding.variable}"
        )
    if quiet:
        return
    if former is None:
        invocation.out(f"Use it with: docker --context {record.context} ...")
    else:
        was = "" if former == record.context else f' (it was "{former or "default"}")'
        invocation.out(f'docker uses it now, by the context "{record.context}"{was}')
    name = "" if record.name == "default" else f" {record.name}"
    invocation.out(f"Look at it with 'offload status', end it with 'offload stop{name}'")

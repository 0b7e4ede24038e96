"""One build, from admission to its results, over as many attempts as its connection needs."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_client.build.admission import admit, leave
from offload_client.build.attachment import CANCEL_SECONDS, Attachment
from offload_client.build.cibranch import build_branches
from offload_client.build.comeback import patience_of
from offload_client.build.contextscan import ContextScans
from offload_client.build.departure import Departure
from offload_client.build.gitlabels import with_git_labels
from offload_client.build.located import Place, connect_to, forget_connections
from offload_client.build.metadata import provenance_mode
from offload_client.build.networkpolicy import check_taken, to_message
from offload_client.build.noderun import NodeRun
from offload_client.build.options import own_platform
from offload_client.build.queuestep import QueueStep
from offload_client.build.results import Results
from offload_client.build.resume import Resume, repeats_of
from offload_client.build.runrecord import RunRecord
from offload_client.build.spec import build_spec
from offload_client.build.vcs import branch_and_revision
from offload_core.aio import finish
from offload_core.devices import wanted_devices
from offload_core.errors import (
    GatewayUnreachableError,
    NodeLostError,
    OffloadError,
    find_offload_error,
)
from offload_core.reference import familiar_reference
from offload_core.tls import GATEWAY_NAME
from offload_proto.v1.builds_service_pb2 import CacheChoice, CreateRequest
from offload_proto.v1.node_service_pb2 import Start

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from grpc import aio

    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.imagesource import NodeImageSource
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.build.privateinputs import PrivateInputs
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.progress.display import Display
    from offload_client.settings import Settings
    from offload_proto.v1.builds_service_pb2 import Assigned
    from offload_proto.v1.node_service_pb2 import Result


@dataclass(frozen=True)
class BuildPart:
    """What makes a build the part of another one, for some of its platforms."""

    group_id: str
    """The same for all parts."""
    name: str
    """Normalised name of the whole image; empty for none."""


class BuildRun:
    """One build from admission to its results."""

    def __init__(
        self,
        invocation: Invocation,
        options: BuildOptions,
        outputs: Sequence[OutputOption],
        files: ContextFiles,
        display: Display,
        connections: Connections,
        settings: Settings,
        private: PrivateInputs,
        *,
        hold: Callable[[Result, NodeImageSource], Awaitable[None]] | None = None,
        part: BuildPart | None = None,
    ) -> None:
        """Prepare.

        Args:
            invocation: of the command.
            options: of the build.
            outputs: the effective ones.
            files: what is built.
            display: shows the build.
            connections: of the process.
            settings: which gateway and project.
            private: secrets and SSH agents.
            hold: awaited when the build has worked, while its image can still be read.
            part: of which build it is a part; None for a whole one.
        """
        self._invocation = invocation
        self._options = options
        self._outputs = outputs
        self._files = files
        self._display = display
        self._connections = connections
        self._settings = settings
        self._hold = hold
        self._private = private
        self._whole = part
        self.build_id = ""
        """Of the latest attempt."""
        self.results = Results(invocation, options, outputs, display)
        self._scans = ContextScans(files.sources, lambda text: display.notice("warning", text))
        self._patience_seconds = patience_of(invocation.environment)
        self._last: tuple[Attachment, RunRecord] | None = None
        """What runs in this attempt, once it has a connection to its node."""
        self._lost_build = ""
        self._runs = 0
        """How many runs were lost."""

    async def run(self, identity: StoredIdentity) -> tuple[Assigned, Result | None]:
        """Build; when the build is lost with its node, build again with what has arrived.

        Returns:
            Where it ran, and how it ended; None when it goes on without this command.

        Raises:
            NodeLostError: the node was lost, and it did not help to try again.
            OffloadError: as `admit` and `at_node`.
        """
        self._options = await with_git_labels(
            self._invocation, self._options, lambda text: self._display.notice("warning", text)
        )
        resume = Resume(repeats_of(self._invocation.environment))
        while True:
            assigned: Assigned | None = None
            try:
                assigned = await self.admit(identity)
                return assigned, await self.at_node(identity, assigned)
            except (NodeLostError, GatewayUnreachableError) as error:
                last, self._last = self._last, None
                why_not = self._why_not_again(error, last, resume)
                if why_not is not None:
                    if why_not and not error.hint:
                        error.hint = why_not
                    raise
                pause = resume.next_pause(progressed=bool(last and last[1].acknowledged_bytes))
                if pause is None:
                    raise
            if assigned is not None and last is not None:
                self._lost_build, self._runs = assigned.build_id, self._runs + 1
                self.results.begin_again()
                self._display.begin_again(_again(assigned, last[1], resume))
            await self._forget(identity, assigned)
            await asyncio.sleep(pause)

    def _why_not_again(
        self,
        error: NodeLostError | GatewayUnreachableError,
        last: tuple[Attachment, RunRecord] | None,
        resume: Resume,
    ) -> str | None:
        """Return why a lost build is not started again, perhaps without words; None if it is."""
        if not _is_lost(error, last, again=resume.begun):
            return ""
        if last is None:
            return None
        record = last[1]
        if not all(map(self.results.may_rewrite, record.outputs_begun)):
            return "a part of its output is written already; run it again"
        if not record.repeatable:
            if not resume.may_repeat:
                return resume.given_up
            resume.repeated += 1
        return None

    async def _forget(self, identity: StoredIdentity, assigned: Assigned | None) -> None:
        """Give up a lost build and all connections, which may be dead without showing it."""
        gateway = self._settings.gateway
        self._connections.drop(gateway, GATEWAY_NAME, identity)
        if assigned is None:
            return
        forget_connections(_place(assigned), self._connections, identity)
        # The node may not have noticed yet, and its slot may be the only one.
        channel = await self._connections.gateway(gateway, identity)
        await leave(channel, assigned.build_id)

    async def admit(self, identity: StoredIdentity) -> Assigned:
        """Wait for a node.

        Raises:
            GatewayUnreachableError: no answer, also over a fresh connection.
            OffloadError: the gateway refuses.
        """
        options, files, gateway = self._options, self._files, self._settings.gateway
        git_branch, revision = branch_and_revision(files.root)
        branch, target_branch = build_branches(git_branch, self._invocation.environment)
        tag = self._whole.name if self._whole is not None else next(iter(options.tags), "")
        name = familiar_reference(tag) if tag else files.root.resolve().name
        request = CreateRequest(
            request_id=secrets.token_hex(16),
            project_id=self._settings.project,
            # Where nothing is built, any node will do.
            platforms=options.platforms if options.call is None else (),
            preferred_platform=own_platform(),
            group_id=self._whole.group_id if self._whole is not None else "",
            name=_sendable(name),
            dockerfile_path=_sendable(options.file or files.dockerfile_name),
            target=options.target,
            vcs_branch=_sendable(branch),
            vcs_revision=revision,
            cache=CacheChoice(
                scope=options.caches.scope,
                read_scopes=options.caches.read_scopes,
                read_off=options.caches.read_off,
                write_off=options.caches.write_off,
            ),
            vcs_target_branch=_sendable(target_branch),
            repeat_of=self._lost_build,
            network_policy=to_message(options.policy_file) if options.policy_file else None,
            devices=wanted_devices(options.entitlements) if options.call is None else (),
        )
        channel = await self._connections.gateway(gateway, identity)
        with QueueStep(self._display) as step:
            try:
                assigned = await admit(channel, gateway, request, step.queued)
            except GatewayUnreachableError:
                if not self._connections.persistent:
                    raise
                # The same request: should the first one have arrived, it is the same build.
                self._connections.drop(gateway, GATEWAY_NAME, identity)
                channel = await self._connections.gateway(gateway, identity)
                assigned = await admit(channel, gateway, request, step.queued)
        try:
            check_taken(options.policy_file, assigned)
        except OffloadError:
            await leave(channel, assigned.build_id)
            raise
        return assigned

    async def at_node(self, identity: StoredIdentity, assigned: Assigned) -> Result | None:
        """Run the build at the first endpoint of its node that answers.

        Returns:
            How it ended; None when it goes on without this command.

        Raises:
            NodeLostError: no endpoint answers, or the node was lost on the way.
        """
        record = RunRecord(assigned.build_id, self._display, self._runs)
        # They are on the terminal already.
        record.warned.update(self._options.remarks)
        self.build_id = assigned.build_id
        keeps = False
        try:
            try:
                return await self._attend(identity, assigned, record)
            except NodeLostError as error:
                # A kept connection may turn out dead; a node never takes a ticket twice.
                if self._last is None or record.heard or not self._connections.persistent:
                    keeps = record.heard and error.connection_broke
                    raise
                forget_connections(_place(assigned), self._connections, identity)
                try:
                    return await self._attend(identity, assigned, record)
                except OffloadError as second:
                    raise (second if record.heard else error) from None
        finally:
            record.close()
            if not (record.result.done() or record.left or keeps):
                # Nobody is to build for a command that has ended, and a slot that is kept for us
                # nobody else could use for a while.
                gateway = await self._connections.gateway(self._settings.gateway, identity)
                await leave(gateway, assigned.build_id)

    async def _attend(
        self, identity: StoredIdentity, assigned: Assigned, record: RunRecord
    ) -> Result | None:
        def open_run(channel: aio.Channel, source: NodeImageSource) -> NodeRun:
            return NodeRun(
                channel,
                lambda: self._connections.beside(channel),
                record,
                self._scans,
                self._display,
                environment=self._invocation.environment,
                results=self.results,
                source=source,
                private=self._private,
            )

        place = _place(assigned)
        attachment = Attachment(
            await connect_to(place, self._connections, identity),
            place,
            record,
            self._connections,
            identity,
            self._settings.gateway,
            self._display,
            open_run,
            self._patience_seconds,
        )
        self._last = attachment, record
        spec = build_spec(
            self._options,
            self._outputs,
            self._files,
            provenance=provenance_mode(self._invocation.environment),
        )
        if self._whole is not None:
            spec.frontend_attributes["multi-platform"] = "true"
        self._private.add_to(spec)
        start = Start(
            ticket=assigned.ticket,
            spec=spec,
            inline_files=self._files.inline,
            detach=self._options.detach,
        )
        departure = Departure(self._invocation, self._options, self._outputs, record, self._display)
        try:
            async with asyncio.TaskGroup() as tasks:
                stream = tasks.create_task(attachment.stay(start))
                try:
                    with departure.open():
                        ended = await _ended(attachment, record, stream, departure)
                    attachment.check_result()
                    result = record.result.result() if ended else None
                    if result is not None and result.HasField("success"):
                        await self.results.deliver(result, attachment.source)
                        if self._hold is not None:
                            await self._hold(result, attachment.source)
                    if ended:
                        await attachment.finish()
                except asyncio.CancelledError:
                    if not record.result.done() and not stream.done():
                        await self._part(attachment, record, stream)
                    raise
                if record.left or not attachment.attached:
                    stream.cancel()
        except BaseExceptionGroup as group:
            raise (find_offload_error(group) or group) from None
        return result

    async def _part(
        self, attachment: Attachment, record: RunRecord, stream: asyncio.Task[None]
    ) -> None:
        """End the build with its command; one that was killed leaves it, as far as it may."""
        if self._invocation.interrupts.vanished and record.independent:
            await finish(attachment.leave(stream), 2 * CANCEL_SECONDS)
        else:
            await finish(attachment.cancel(), 2 * CANCEL_SECONDS)


async def _ended(
    attachment: Attachment, record: RunRecord, stream: asyncio.Task[None], departure: Departure
) -> bool:
    """Wait for the end of the build, or for that of our part in it: then return False."""
    while True:
        leaving = asyncio.ensure_future(departure.wait())
        try:
            await asyncio.wait(
                (record.result, stream, leaving), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            leaving.cancel()
        if not record.result.done():
            if stream.done():
                await stream
            elif await attachment.leave(stream):
                return False
        if record.result.done():
            return True
        departure.refused()


def _is_lost(
    error: NodeLostError | GatewayUnreachableError,
    last: tuple[Attachment, RunRecord] | None,
    *,
    again: bool,
) -> bool:
    """Return whether the build is lost, so that another attempt is not a second one beside it.

    Args:
        error: of the last attempt.
        last: what ran in it; None when it had no connection to a node.
        again: that was not the first one.
    """
    if last is None:
        # After a loss the network may still be away; before, something is wrong.
        return again
    attachment, record = last
    return (
        isinstance(error, NodeLostError)
        and error.connection_broke
        # A node gives an output once: a build whose output was cut off has failed there.
        and (attachment.forgotten or not record.heard or record.output_interrupted)
        and record.unsettled
    )


def _again(assigned: Assigned, record: RunRecord, resume: Resume) -> str:
    node_id, build_id = assigned.node_id, assigned.build_id
    if record.repeatable:
        return (
            f"the connection to node {node_id} was lost; trying again, "
            "what has arrived is not sent again"
        )
    lost = f"node {node_id} was lost with build {build_id}"
    if record.output_interrupted:
        lost = f"the connection to node {node_id} was lost with an output of build {build_id}"
    return (
        f"{lost}; what follows is a new run of it, from its beginning "
        f"(repeat {resume.repeated} of {resume.repeats})"
    )


def _place(assigned: Assigned) -> Place:
    endpoints = tuple(assigned.endpoints)
    return Place(assigned.build_id, assigned.node_id, endpoints, assigned.server_name)


def _sendable(text: str) -> str:
    """Return a title for the history; names of files need not be UTF-8."""
    return text.encode("utf-8", "replace").decode()

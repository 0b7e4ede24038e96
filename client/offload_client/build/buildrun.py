"""One build, from admission to its results, over as many attempts as its connection needs."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

from offload_client.build.admission import admit, leave
from offload_client.build.cibranch import build_branches
from offload_client.build.contextscan import ContextScans
from offload_client.build.noderun import NodeRun
from offload_client.build.queuestep import QueueStep
from offload_client.build.results import Results
from offload_client.build.resume import Resume
from offload_client.build.spec import build_spec
from offload_client.build.vcs import branch_and_revision
from offload_client.reference import familiar_reference
from offload_core.errors import (
    GatewayUnreachableError,
    NodeLostError,
    OffloadError,
    find_offload_error,
)
from offload_core.tls import GATEWAY_NAME
from offload_proto.v1.builds_service_pb2 import CacheChoice, CreateRequest
from offload_proto.v1.node_service_pb2 import Start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.options import BuildOptions, OutputOption
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.invocation import Invocation
    from offload_client.progress.display import Display
    from offload_client.settings import Settings
    from offload_proto.v1.builds_service_pb2 import Assigned
    from offload_proto.v1.node_service_pb2 import Result


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
    ) -> None:
        self._invocation = invocation
        self._options = options
        self._outputs = outputs
        self._files = files
        self._display = display
        self._connections = connections
        self._settings = settings
        self.results = Results(invocation, options, outputs, display)
        self._scans = ContextScans(files.sources, lambda text: display.notice("warning", text))
        self._last: NodeRun | None = None
        """What runs in this attempt, once it has a connection to its node."""

    async def run(self, identity: StoredIdentity) -> tuple[Assigned, Result]:
        """Build; when the connection to the node breaks, build again with what has arrived.

        Raises:
            NodeLostError: the node was lost, and it did not help to try again.
            OffloadError: as `admit` and `at_node`.
        """
        resume = Resume()
        while True:
            assigned: Assigned | None = None
            try:
                assigned = await self.admit(identity)
                return assigned, await self.at_node(identity, assigned)
            except (NodeLostError, GatewayUnreachableError) as error:
                last, self._last = self._last, None
                if not _may_resume(error, last, again=resume.begun):
                    raise
                pause = resume.next_pause(progressed=bool(last and last.acknowledged_bytes))
                if pause is None:
                    raise
            if assigned is not None and last is not None:
                self._display.notice(
                    "warning",
                    f"the connection to node {assigned.node_id} was lost; trying again, "
                    "what has arrived is not sent again",
                )
            await self._forget(identity, assigned)
            await asyncio.sleep(pause)

    async def _forget(self, identity: StoredIdentity, assigned: Assigned | None) -> None:
        """Give up a lost build and all connections, which may be dead without showing it."""
        gateway = self._settings.gateway
        self._connections.drop(gateway, GATEWAY_NAME, identity)
        if assigned is None:
            return
        for endpoint in assigned.endpoints:
            self._connections.drop(endpoint, assigned.server_name, identity)
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
        name = familiar_reference(options.tags[0]) if options.tags else files.root.resolve().name
        request = CreateRequest(
            request_id=secrets.token_hex(16),
            project_id=self._settings.project,
            platforms=options.platforms,
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
        )
        channel = await self._connections.gateway(gateway, identity)
        with QueueStep(self._display) as step:
            try:
                return await admit(channel, gateway, request, step.queued)
            except GatewayUnreachableError:
                if not self._connections.persistent:
                    raise
            # The same request: should the first one have arrived, it is the same build.
            self._connections.drop(gateway, GATEWAY_NAME, identity)
            channel = await self._connections.gateway(gateway, identity)
            return await admit(channel, gateway, request, step.queued)

    async def at_node(self, identity: StoredIdentity, assigned: Assigned) -> Result:
        """Run the build at the first endpoint of its node that answers.

        Raises:
            NodeLostError: no endpoint answers, or the node was lost on the way.
        """
        run: NodeRun | None = None
        try:
            try:
                run = await self._open(identity, assigned)
                return await self._drive(run, assigned)
            except NodeLostError as error:
                # A kept connection may turn out dead; a node never takes a ticket twice.
                if run is None or run.heard or not self._connections.persistent:
                    raise
                for endpoint in assigned.endpoints:
                    self._connections.drop(endpoint, assigned.server_name, identity)
                run = await self._open(identity, assigned)
                try:
                    return await self._drive(run, assigned)
                except OffloadError as second:
                    raise (second if run.heard else error) from None
        finally:
            if run is None or not run.heard:
                # The slot at the node is kept for us; nobody else could use it for a while.
                gateway = await self._connections.gateway(self._settings.gateway, identity)
                await leave(gateway, assigned.build_id)

    async def _open(self, identity: StoredIdentity, assigned: Assigned) -> NodeRun:
        channel = await self._connections.connect(
            assigned.endpoints, assigned.server_name, identity
        )
        if channel is None:
            raise NodeLostError(
                f"node {assigned.node_id} does not answer at {', '.join(assigned.endpoints)}"
            )
        self._last = NodeRun(
            channel,
            lambda: self._connections.beside(channel),
            assigned.build_id,
            self._scans,
            self._display,
            environment=self._invocation.environment,
            results=self.results,
        )
        return self._last

    async def _drive(self, run: NodeRun, assigned: Assigned) -> Result:
        start = Start(
            ticket=assigned.ticket,
            spec=build_spec(self._options, self._outputs, self._files),
            inline_files=self._files.inline,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                stream = tasks.create_task(run.run(start))
                await asyncio.wait((run.result, stream), return_when=asyncio.FIRST_COMPLETED)
                if not run.result.done():
                    await stream
                result = run.result.result()
                if result.HasField("success"):
                    await self.results.deliver(result, run.source)
                await run.finish()
        except BaseExceptionGroup as group:
            raise (find_offload_error(group) or group) from None
        return result


def _may_resume(
    error: NodeLostError | GatewayUnreachableError, last: NodeRun | None, *, again: bool
) -> bool:
    """Return whether a new attempt continues the work of the one that failed.

    Args:
        error: of the last attempt.
        last: what ran in it; None when it had no connection to a node.
        again: that was not the first one.
    """
    if last is None:
        # After a loss the network may still be away; before, something is wrong.
        return again
    return (
        isinstance(error, NodeLostError)
        and error.connection_broke
        and not last.result.done()
        and not last.output_began
        and last.repeatable
    )


def _sendable(text: str) -> str:
    """Return a title for the history; names of files need not be UTF-8."""
    return text.encode("utf-8", "replace").decode()

"""Looking on at a build that exists already, from its first line to its end.

While the node has the build it tells everything as it happens; later, and where the node cannot
be reached, the gateway has the log.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc

from offload_client.build.callerrors import node_error
from offload_client.build.comeback import Comeback
from offload_client.build.located import ENDED, connect_to, locate
from offload_client.progress.attempts import StepNames
from offload_client.progress.opensteps import OpenSteps
from offload_core.errors import (
    GatewayUnreachableError,
    NodeLostError,
    NotFoundError,
    VersionError,
)
from offload_core.versions import call_metadata
from offload_proto.v1.builds_service_pb2 import BuildState, LogsRequest
from offload_proto.v1.node_service_pb2 import Failure, Rejoin, Result, RunRequest, Success
from offload_proto.v1.node_service_pb2_grpc import NodeBuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from offload_client.build.located import Place
    from offload_client.connections import Connections
    from offload_client.gateway import GatewayCalls
    from offload_client.identity import StoredIdentity
    from offload_client.progress.display import Display
    from offload_proto.v1.builds_service_pb2 import Build
    from offload_proto.v1.events_pb2 import ProgressBatch

LOOK_SECONDS = 1.0
"""How often the gateway is asked about a build that waits for a node, or is about to end."""
END_SECONDS = 30.0
"""The record of a build may end a little later than its log."""
_KINDS = {
    BuildState.BUILD_STATE_FAILED: Failure.KIND_BUILD,
    BuildState.BUILD_STATE_CANCELED: Failure.KIND_CANCELED,
    BuildState.BUILD_STATE_LOST: Failure.KIND_NODE,
}


class Following:
    """Follows one build of the caller."""

    def __init__(
        self,
        build_id: str,
        calls: GatewayCalls,
        connections: Connections,
        identity: StoredIdentity,
        display: Display,
    ) -> None:
        """Prepare.

        Args:
            build_id: or the beginning of it.
            calls: to the gateway.
            connections: of the command.
            identity: of the user.
            display: shows the build.
        """
        self.build_id = build_id
        self._calls = calls
        self._connections = connections
        self._identity = identity
        self._display = display
        self._shown = 0
        self._runs = 0
        """Runs before this one that were lost."""
        self._names = StepNames(0)
        self._open_steps = OpenSteps()

    async def run(self) -> Result:
        """Show the build, and its repeats when it was lost with its node; return how it ended.

        Raises:
            NotFoundError: there is no such build.
            OffloadError: neither node nor gateway can be reached for some minutes.
        """
        while True:
            result = await self._one_run()
            if not result.HasField("failure") or result.failure.kind != Failure.KIND_NODE:
                return result
            build, _ = await locate(self._calls, self.build_id)
            if not build.repeated_by:
                return result
            self._display.feed(self._names.batch(self._open_steps.canceled()))
            self._display.begin_again(
                f"build {self.build_id} was lost with node {build.node_id}; what follows is its "
                f"repeat {build.repeated_by}, from its beginning"
            )
            self._runs += 1
            self._names, self._open_steps = StepNames(self._runs), OpenSteps()
            self.build_id, self._shown = build.repeated_by, 0

    async def _one_run(self) -> Result:
        comeback = Comeback()
        away = False
        while True:
            before = self._shown
            try:
                build, place = await self._placed()
                if build.state in ENDED and not place.endpoints:
                    return await self._replay(build)
                return await self._at_node(build, place)
            except (NodeLostError, GatewayUnreachableError) as error:
                broke = isinstance(error, GatewayUnreachableError) or error.connection_broke
                if not broke:
                    raise
                if self._shown > before:
                    comeback, away = Comeback(), False
                pause = comeback.next_pause()
                if pause is None:
                    raise
                if not away:
                    away = True
                    self._display.notice("warning", "the connection was lost; coming back ...")
                await asyncio.sleep(pause)

    async def _placed(self) -> tuple[Build, Place]:
        """Wait until the build is at a node, or has ended."""
        build, place = await locate(self._calls, self.build_id)
        self.build_id = build.build_id
        if build.state == BuildState.BUILD_STATE_QUEUED:
            with self._display.local_step("[offload] waiting for a node"):
                while build.state == BuildState.BUILD_STATE_QUEUED:
                    await asyncio.sleep(LOOK_SECONDS)
                    build, place = await locate(self._calls, self.build_id)
        return build, place

    async def _at_node(self, build: Build, place: Place) -> Result:
        try:
            return await self._look_on(place)
        except (NotFoundError, VersionError):
            # It has forgotten the build, or knows no visitors.
            return await self._replay(build)
        except NodeLostError as error:
            if error.connection_broke:
                now, _ = await locate(self._calls, self.build_id)
                if now.state in ENDED:
                    return await self._replay(now)
            raise

    async def _look_on(self, place: Place) -> Result:
        channel = await connect_to(place, self._connections, self._identity)
        over = asyncio.Event()
        rejoin = Rejoin(build_id=self.build_id, resume_after=self._shown, view_only=True)
        call = NodeBuildsServiceStub(channel).Rejoin(
            _visit(rejoin, over),
            metadata=call_metadata(("offload-build-id", self.build_id)),
        )
        try:
            async for message in call:
                kind = message.WhichOneof("message")
                if kind == "progress":
                    await self._show(message.progress)
                elif kind == "notice":
                    self._display.notice(message.notice.level, message.notice.text)
                elif kind == "result":
                    return message.result
        except grpc.RpcError as error:
            raise node_error(error) from error  # type: ignore[arg-type]
        finally:
            over.set()
            call.cancel()
        # The node lets visitors go when it stops.
        lost = NodeLostError("the node ended the visit without a result")
        lost.connection_broke = True
        raise lost

    async def _replay(self, build: Build) -> Result:
        """Show what the gateway has of the log, up to the end of the build."""
        follow = build.state not in ENDED
        async with aclosing(
            read_log(self._calls, self.build_id, self._shown, follow=follow)
        ) as log:
            async for batch in log:
                await self._show(batch)
        deadline = asyncio.get_running_loop().time() + END_SECONDS
        while build.state not in ENDED:
            build, _ = await locate(self._calls, self.build_id)
            if build.state in ENDED:
                break
            if asyncio.get_running_loop().time() > deadline:
                raise NodeLostError(
                    f"the log of build {self.build_id} has ended, but its node does not say how "
                    "the build did",
                    hint=f"look again later with: offload inspect {self.build_id}",
                )
            await asyncio.sleep(LOOK_SECONDS)
        return result_of(build)

    async def _show(self, batch: ProgressBatch) -> None:
        if batch.sequence > self._shown:
            self._shown = batch.sequence
            self._open_steps.take(batch)
            self._display.feed(self._names.batch(batch))
            # What is too much for the reader of the display waits where it is.
            await self._display.room()


async def read_log(
    calls: GatewayCalls, build_id: str, after: int = 0, *, follow: bool
) -> AsyncGenerator[ProgressBatch]:
    """Yield the progress of a build from the gateway's record, over as many calls as it needs.

    Args:
        calls: to the gateway.
        build_id: or the beginning of it.
        after: skip batches up to and including this sequence number.
        follow: stay until the build ends.

    Raises:
        GatewayUnreachableError: the gateway did not come back for some minutes.
        OffloadError: what it says.
    """
    comeback: Comeback | None = None
    while True:
        request = LogsRequest(build_id=build_id, resume_after=after, follow=follow)
        try:
            async with aclosing(_batches(calls, request)) as batches:
                async for batch in batches:
                    comeback = None
                    if batch.sequence > after:
                        after = batch.sequence
                        yield batch
            return
        except GatewayUnreachableError:
            if not after:
                raise
            comeback = comeback or Comeback()
            pause = comeback.next_pause()
            if pause is None:
                raise
            await asyncio.sleep(pause)


async def _batches(calls: GatewayCalls, request: LogsRequest) -> AsyncGenerator[ProgressBatch]:
    async for message in calls.stream(calls.builds.Logs, request):
        for batch in message.batches:
            yield batch


def result_of(build: Build) -> Result:
    """Return how a build ended, as far as the gateway's record says it."""
    kind = _KINDS.get(build.state)
    if kind is None:
        return Result(success=Success(), stats=build.stats)
    state = BuildState.Name(build.state).removeprefix("BUILD_STATE_").lower()
    message = build.error or f"the build was {state}"
    return Result(failure=Failure(kind=kind, message=message), stats=build.stats)


async def _visit(rejoin: Rejoin, over: asyncio.Event) -> AsyncIterator[RunRequest]:
    yield RunRequest(rejoin=rejoin)
    await over.wait()

"""A build's connection to its node, taken up again when it breaks.

A laptop sleeps, a Wi-Fi changes, a relay restarts: the build at the node goes on, or waits for its
client. So the client comes back to it, with what it has been told so far.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from offload_client.build.comeback import Comeback
from offload_client.build.imagesource import NodeImageSource
from offload_client.build.located import ENDED, connect_to, forget_connections, locate
from offload_client.gateway import GatewayCalls
from offload_core.errors import NodeLostError, NotFoundError, OffloadError, VersionError
from offload_core.tls import GATEWAY_NAME
from offload_core.versions import call_metadata
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.node_service_pb2 import Rejoin, RunRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpc import aio

    from offload_client.build.located import Place
    from offload_client.build.noderun import NodeRun
    from offload_client.build.runrecord import RunRecord
    from offload_client.connections import Connections
    from offload_client.identity import StoredIdentity
    from offload_client.progress.display import Display
    from offload_proto.v1.builds_service_pb2 import Build
    from offload_proto.v1.node_service_pb2 import Start

CANCEL_SECONDS = 2.0
LEAVE_SECONDS = 10.0
SETTLED_SECONDS = 30.0
"""A connection that held for so long did work; the next loss is another one."""
LOST = "the connection was lost; coming back ..."


class Attachment:
    """Holds a build from Start to Done.

    Attributes:
        source: content of the node, over whatever connection there is.
        forgotten: the node does not know the build any more.
    """

    def __init__(
        self,
        channel: aio.Channel,
        place: Place,
        record: RunRecord,
        connections: Connections,
        identity: StoredIdentity,
        gateway: str,
        display: Display,
        open_run: Callable[[aio.Channel, NodeImageSource], NodeRun],
        patience_seconds: float,
    ) -> None:
        """Prepare.

        Args:
            channel: to the node.
            place: where the node can be reached.
            record: of the build.
            connections: of the command.
            identity: of the user.
            gateway: HOST:PORT.
            display: told about losses.
            open_run: makes the conversation over a connection.
            patience_seconds: how long it tries to come back after a loss.
        """
        self.forgotten = False
        self._place = place
        self._record = record
        self._connections = connections
        self._identity = identity
        self._gateway = gateway
        self._display = display
        self._open_run = open_run
        self._patience_seconds = patience_seconds
        self._attached = asyncio.Condition()
        self._channel = channel
        metadata = call_metadata(("offload-build-id", record.build_id))
        self.source = NodeImageSource(channel, metadata, self._renewed)
        self._run: NodeRun | None = open_run(channel, self.source)

    @property
    def attached(self) -> bool:
        """Whether there is a connection now."""
        return self._run is not None

    async def stay(self, start: Start) -> None:
        """Run the build until its end is settled by `finish` or `leave`; comes back after losses.

        Raises:
            NodeLostError: the node is lost, or does not know the build any more, or the connection
                did not come back in time.
            OffloadError: what the node says.
        """
        request = RunRequest(start=start)
        comeback: Comeback | None = None
        while True:
            began = time.monotonic()
            try:
                run = self._run or await self._reconnect()
                await run.run(request)
                return
            except NodeLostError as error:
                lost, self._run = self._run, None
                if self._record.over or self._record.left:
                    return
                if self.forgotten or not self._may_return(error):
                    raise
                worked = lost is not None and lost.heard
                if comeback is None or worked or time.monotonic() - began > SETTLED_SECONDS:
                    comeback = Comeback(self._patience_seconds)
                    self._display.notice("warning", LOST)
                pause = comeback.next_pause()
                if pause is None:
                    raise self._given_up(error) from error
            except (NotFoundError, VersionError) as error:
                if request.HasField("start"):
                    raise
                # VersionError: a node that knows no way back.
                self.forgotten = True
                raise await self._forgotten(error) from error
            rejoin = Rejoin(build_id=self._record.build_id, resume_after=self._record.last_sequence)
            request = RunRequest(rejoin=rejoin)
            await asyncio.sleep(pause)

    def _may_return(self, error: NodeLostError) -> bool:
        record = self._record
        return error.connection_broke and record.heard and not record.output_interrupted

    async def _reconnect(self) -> NodeRun:
        forget_connections(self._place, self._connections, self._identity)
        self._connections.drop(self._gateway, GATEWAY_NAME, self._identity)
        try:
            channel = await connect_to(self._place, self._connections, self._identity)
        except NodeLostError:
            if not await self._moved():
                raise
            channel = await connect_to(self._place, self._connections, self._identity)
        self.source.use(channel)
        run = self._run = self._open_run(channel, self.source)
        async with self._attached:
            self._channel = channel
            self._attached.notify_all()
        return run

    async def _moved(self) -> bool:
        """Ask the gateway whether the node is to be found elsewhere now.

        Raises:
            NodeLostError: the gateway knows that the node is lost.
        """
        try:
            build, place = await self._locate()
        except OffloadError:
            # It is as far away as the node.
            return False
        if build.state == BuildState.BUILD_STATE_LOST:
            self.forgotten = True
            raise _broken(build.error or f"node {place.node_id} was lost")
        if not place.endpoints or place == self._place:
            return False
        self._place = place
        return True

    async def _renewed(self, broken: aio.Channel) -> aio.Channel:
        """Return the connection that takes the place of one that broke."""
        try:
            async with asyncio.timeout(self._patience_seconds + SETTLED_SECONDS), self._attached:
                await self._attached.wait_for(lambda: self._channel is not broken)
        except TimeoutError:
            raise _broken("the connection to the node broke") from None
        return self._channel

    def _given_up(self, error: NodeLostError) -> NodeLostError:
        build_id = self._record.build_id
        if not self._record.independent:
            return error
        return _broken(
            f"{error.message}; the build goes on without this command",
            hint=f"follow it with: offload attach {build_id}",
        )

    async def _forgotten(self, error: OffloadError) -> NodeLostError:
        build_id = self._record.build_id
        text = f"node {self._place.node_id} does not know build {build_id} any more"
        hint = ""
        if isinstance(error, VersionError):
            text = f"the connection to node {self._place.node_id} was lost"
        else:
            try:
                build, _ = await self._locate()
            except OffloadError:
                build = None
            if build is not None and build.state in ENDED:
                state = BuildState.Name(build.state).removeprefix("BUILD_STATE_").lower()
                text += f"; it has ended meanwhile: {state}"
                hint = f"see: offload inspect {build_id}"
        return _broken(text, hint=hint)

    async def _locate(self) -> tuple[Build, Place]:
        channel = await self._connections.gateway(self._gateway, self._identity)
        return await locate(GatewayCalls(self._gateway, channel), self._record.build_id)

    def check_result(self) -> None:
        """Look whether the build ended only because its node stopped or was restarted.

        Raises:
            NodeLostError: so it is.
        """
        if self._record.lost_with_node:
            self.forgotten = True
            raise _broken(self._record.result.result().failure.message)

    async def finish(self) -> None:
        """Say that nothing more is wanted from the node; `stay` returns soon after."""
        self._record.over = True
        if self._run is not None:
            await self._run.finish()

    async def leave(self, stream: asyncio.Task[None]) -> bool:
        """Let the build go on without this client; False when the node needs it.

        Args:
            stream: the task of `stay`.
        """
        record = self._record
        record.left = True
        if self._run is None:
            # There is nobody to tell; the build goes on or not as the node said last.
            record.left = record.independent
            return record.left
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._run.leave()
                while record.left and not stream.done():
                    news = asyncio.ensure_future(record.standing_changed())
                    try:
                        await asyncio.wait((stream, news), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        news.cancel()
        except TimeoutError:
            # Going away unasked does no harm to a build that is independent.
            record.left = record.independent
        if stream.done():
            stream.result()
            record.left = True
        return record.left

    async def cancel(self) -> bool:
        """End the build; False when the node has not said within 2 seconds that it has ended."""
        if self._run is None:
            return False
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await self._run.cancel("canceled by the user")
                await asyncio.wait((self._record.result,))
        except TimeoutError:
            return False
        return True


def _broken(text: str, *, hint: str = "") -> NodeLostError:
    error = NodeLostError(text, hint=hint)
    error.connection_broke = True
    return error

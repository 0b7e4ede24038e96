"""The control stream of one build: what the node asks is answered, what it tells is shown."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from offload_client.build.callerrors import node_error
from offload_client.build.contextanswers import ContextAnswers
from offload_client.build.privateinputs import REQUESTS, PrivateAnswers
from offload_client.build.upload import Uploader
from offload_client.bytepipe import in_thread
from offload_core.aio import finish
from offload_core.errors import ConfigError, NodeLostError, find_offload_error
from offload_core.versions import call_metadata
from offload_proto.v1.node_service_pb2 import CancelRun, CredentialsReply, Done, Leave, RunRequest
from offload_proto.v1.node_service_pb2_grpc import NodeBuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from grpc import aio

    from offload_client.build.contextscan import ContextScans
    from offload_client.build.imagesource import NodeImageSource
    from offload_client.build.privateinputs import PrivateInputs
    from offload_client.build.results import Results
    from offload_client.build.runrecord import RunRecord
    from offload_client.progress.display import Display
    from offload_proto.v1.node_service_pb2 import (
        CredentialsRequest,
        OutputReady,
        RunResponse,
    )

OUTBOX_MESSAGES = 32
CLOSE_SECONDS = 5.0


class NodeRun:
    """One connection of a build to its node: from Start, or Rejoin, to Done.

    When the build has ended the stream stays open until `finish`, because the node serves the
    image and the outputs for as long.
    """

    def __init__(
        self,
        channel: aio.Channel,
        open_channel: Callable[[], AbstractAsyncContextManager[aio.Channel]],
        record: RunRecord,
        scans: ContextScans,
        display: Display,
        *,
        environment: Mapping[str, str],
        results: Results,
        source: NodeImageSource,
        private: PrivateInputs,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            channel: to the node.
            open_channel: opens another connection to it.
            record: of the build; filled here.
            scans: the local sources.
            display: shows what the node tells.
            environment: of the command, for registry logins.
            results: takes the outputs.
            source: reads outputs.
            private: secrets and SSH agents.
        """
        self.channel = channel
        self.heard = False
        """The node has said something over this connection."""
        self.metadata = call_metadata(("offload-build-id", record.build_id))
        self._record = record
        self._display = display
        self._environment = environment
        self._results = results
        self._source = source
        self._outbox: asyncio.Queue[RunRequest | None] = asyncio.Queue(OUTBOX_MESSAGES)
        self._uploader = Uploader(
            channel, self.metadata, self._outbox.put, record.step, open_channel
        )
        self._answers = ContextAnswers(
            scans, self._outbox.put, self._uploader, record.step, record.listings
        )
        self._private = PrivateAnswers(private, self._outbox.put)

    async def run(self, first: RunRequest) -> None:
        """Drive the stream until `finish` or `leave`, or until it breaks.

        Args:
            first: Start or Rejoin.

        Raises:
            NodeLostError: the node went away, or the connection to it broke.
            OffloadError: the node refused the build.
        """
        record = self._record
        await self._outbox.put(first)
        stub = NodeBuildsServiceStub(self.channel)
        method = stub.Run if first.HasField("start") else stub.Rejoin
        call = method(self._requests(), metadata=self.metadata)
        try:
            async with asyncio.TaskGroup() as tasks:
                upload = tasks.create_task(self._uploader.run())
                async for message in call:
                    record.heard = self.heard = True
                    self._take(message, tasks)
                    if self._display.crowded:
                        # The log waits at the node; the build does not wait for it.
                        await self._display.room()
                upload.cancel()
            if not record.result.done() and not record.leave_sent:
                raise NodeLostError("the node ended the build without a result")
        except BaseExceptionGroup as group:
            if not (record.over or (record.left and _only_broke(group))):
                raise _first_error(group) from None
            _, other = group.split(grpc.RpcError)
            if other is not None:
                raise other from None
        finally:
            call.cancel()
            await finish(self._private.close(), CLOSE_SECONDS)
            record.acknowledged_bytes += self._uploader.acknowledged_bytes
            record.step.forget_unsent()

    async def finish(self) -> None:
        """Say that nothing more is wanted from the node; `run` returns soon after."""
        self._record.over = True
        await self._outbox.put(RunRequest(done=Done()))
        await self._outbox.put(None)

    async def leave(self) -> None:
        """Say that the client goes and the build stays; `run` returns soon if it may."""
        self._record.left = self._record.leave_sent = True
        await self._outbox.put(RunRequest(leave=Leave()))

    async def cancel(self, reason: str) -> None:
        """End the build; its result says so."""
        await self._outbox.put(RunRequest(cancel=CancelRun(reason=reason)))

    async def _requests(self) -> AsyncIterator[RunRequest]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def _take(self, message: RunResponse, tasks: asyncio.TaskGroup) -> None:
        kind = message.WhichOneof("message")
        if kind == "progress":
            self._record.show(message.progress)
            self._results.take_progress(message.progress)
        elif kind == "context_request":
            tasks.create_task(self._answers.send_listing(message.context_request))
        elif kind == "need_pages":
            tasks.create_task(self._answers.send_pages(message.need_pages))
        elif kind == "need_blobs":
            self._answers.want(message.need_blobs)
        elif kind == "credentials_request":
            tasks.create_task(self._send_credentials(message.credentials_request))
        elif kind in REQUESTS:
            self._private.take(message)
        elif kind == "output_ready":
            self._begin_output(message.output_ready, tasks)
        elif kind == "notice":
            self._display.notice(message.notice.level, message.notice.text)
        elif kind == "independence":
            self._record.stand(message.independence)
        elif kind == "result" and not self._record.result.done():
            self._record.step.close(complete=message.result.HasField("success"))
            self._record.result.set_result(message.result)

    def _begin_output(self, ready: OutputReady, tasks: asyncio.TaskGroup) -> None:
        # After a lost connection the node announces again what it holds.
        if ready.output_index not in self._record.outputs_begun:
            self._record.outputs_begun.add(ready.output_index)
            tasks.create_task(self._receive_output(ready))

    async def _receive_output(self, ready: OutputReady) -> None:
        await self._results.receive(ready, self._source)
        self._record.outputs_done.add(ready.output_index)

    async def _send_credentials(self, request: CredentialsRequest) -> None:
        from offload_client.dockerauth import credentials_for

        reply = CredentialsReply(request_id=request.request_id)
        try:
            found = await in_thread(
                lambda: credentials_for(request.host, self._environment, request.repository),
                name="credentials",
            )
        except ConfigError as error:
            # As docker does: most images need no login, so the build goes on without one.
            found = None
            if not any(told.startswith(error.message) for told in self._record.warned):
                self._record.warned.add(error.message)
                self._display.notice("warning", error.message)
        if found is not None:
            reply.username, reply.secret = found
        await self._outbox.put(RunRequest(credentials_reply=reply))


def _only_broke(group: BaseExceptionGroup[BaseException]) -> bool:
    """Return whether the connection went away and nothing else went wrong."""
    error = _first_error(group)
    return isinstance(error, NodeLostError) and error.connection_broke


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what went wrong as one error: what the node says, before what followed from it."""
    broken: BaseException | None = group.split(grpc.RpcError)[0]
    while isinstance(broken, BaseExceptionGroup):
        broken = broken.exceptions[0]
    said = None if broken is None else node_error(broken)  # type: ignore[arg-type]
    own = find_offload_error(group)
    if own is None or (said is not None and not isinstance(said, NodeLostError)):
        return said or group
    return own

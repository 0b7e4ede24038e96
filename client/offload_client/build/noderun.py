"""The control stream of one build: what the node asks is answered, what it tells is shown."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from offload_client.build.callerrors import node_error
from offload_client.build.contextanswers import ContextAnswers
from offload_client.build.imagesource import NodeImageSource
from offload_client.build.sendingstep import SendingStep
from offload_client.build.upload import Uploader
from offload_client.bytepipe import in_thread
from offload_client.progress.opensteps import OpenSteps
from offload_core.errors import ConfigError, NodeLostError, find_offload_error
from offload_core.versions import call_metadata
from offload_proto.v1.node_service_pb2 import CredentialsReply, Done, RunRequest, Start
from offload_proto.v1.node_service_pb2_grpc import NodeBuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from grpc import aio

    from offload_client.build.contextscan import ContextScans
    from offload_client.build.results import Results
    from offload_client.progress.display import Display
    from offload_proto.v1.node_service_pb2 import (
        CredentialsRequest,
        OutputReady,
        Result,
        RunResponse,
    )

OUTBOX_MESSAGES = 32


class NodeRun:
    """One build at a node, from Start to Done.

    `result` is set when the build has ended; the stream stays open until `finish`, because the
    node serves the image and the outputs for as long.
    """

    def __init__(
        self,
        channel: aio.Channel,
        open_channel: Callable[[], AbstractAsyncContextManager[aio.Channel]],
        build_id: str,
        scans: ContextScans,
        display: Display,
        *,
        environment: Mapping[str, str],
        results: Results,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            channel: to the node.
            open_channel: opens another connection to it.
            build_id: of the ticket.
            scans: the local sources.
            display: shows what the node tells.
            environment: of the command, for registry logins.
            results: takes the outputs.
        """
        self._channel = channel
        self.metadata = call_metadata(("offload-build-id", build_id))
        self._display = display
        self._environment = environment
        self._results = results
        self.source = NodeImageSource(channel, self.metadata)
        self.heard = False
        """The node has said something, so it has taken the build."""
        self.output_began = False
        """Some of the build's output may have been written."""
        self.repeatable = True
        """When the connection broke, the build could be started again unasked."""
        self._outbox: asyncio.Queue[RunRequest | None] = asyncio.Queue(OUTBOX_MESSAGES)
        self._step = SendingStep(display)
        self._open_steps = OpenSteps()
        self._uploader = Uploader(
            channel, self.metadata, self._outbox.put, self._step, open_channel
        )
        self._answers = ContextAnswers(scans, self._outbox.put, self._uploader, self._step)
        self._warned: set[str] = set()
        self._over = asyncio.Event()
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    @property
    def acknowledged_bytes(self) -> int:
        """Content that the node has for good."""
        return self._uploader.acknowledged_bytes

    async def run(self, start: Start) -> None:
        """Drive the stream until `finish` or until it breaks.

        Raises:
            NodeLostError: the node went away, or the connection to it broke.
            OffloadError: the node refused the build.
        """
        await self._outbox.put(RunRequest(start=start))
        call = NodeBuildsServiceStub(self._channel).Run(self._requests(), metadata=self.metadata)
        try:
            async with asyncio.TaskGroup() as tasks:
                upload = tasks.create_task(self._uploader.run())
                async for message in call:
                    self.heard = True
                    self._take(message, tasks)
                upload.cancel()
            if not self.result.done():
                raise NodeLostError("the node ended the build without a result")
        except BaseExceptionGroup as group:
            if not self._over.is_set():
                raise _first_error(group) from None
            _, other = group.split(grpc.RpcError)
            if other is not None:
                raise other from None
        finally:
            call.cancel()
            self._step.close(complete=False)
            if not self.result.done():
                self.repeatable = self._open_steps.repeatable
                # Another attempt may tell of the same steps again.
                self._display.feed(self._open_steps.canceled())

    async def finish(self) -> None:
        """Say that nothing more is wanted from the node; `run` returns soon after."""
        self._over.set()
        await self._outbox.put(RunRequest(done=Done()))
        await self._outbox.put(None)

    async def _requests(self) -> AsyncIterator[RunRequest]:
        while (message := await self._outbox.get()) is not None:
            yield message

    def _take(self, message: RunResponse, tasks: asyncio.TaskGroup) -> None:
        kind = message.WhichOneof("message")
        if kind == "progress":
            self._display.feed(message.progress)
            self._open_steps.take(message.progress)
            self._step.watch(message.progress)
        elif kind == "context_request":
            tasks.create_task(self._answers.send_listing(message.context_request))
        elif kind == "need_pages":
            tasks.create_task(self._answers.send_pages(message.need_pages))
        elif kind == "need_blobs":
            self._answers.want(message.need_blobs)
        elif kind == "credentials_request":
            tasks.create_task(self._send_credentials(message.credentials_request))
        elif kind == "output_ready":
            self.output_began = True
            tasks.create_task(self._receive_output(message.output_ready))
        elif kind == "notice":
            self._display.notice(message.notice.level, message.notice.text)
        elif kind == "result" and not self.result.done():
            self._step.close(complete=message.result.HasField("success"))
            self.result.set_result(message.result)

    async def _receive_output(self, ready: OutputReady) -> None:
        await self._results.receive(ready, self.source)

    async def _send_credentials(self, request: CredentialsRequest) -> None:
        from offload_client.dockerauth import credentials_for

        reply = CredentialsReply(request_id=request.request_id)
        try:
            found = await in_thread(
                lambda: credentials_for(request.host, self._environment), name="credentials"
            )
        except ConfigError as error:
            # As docker does: most images need no login, so the build goes on without one.
            found = None
            if error.message not in self._warned:
                self._warned.add(error.message)
                self._display.notice("warning", error.message)
        if found is not None:
            reply.username, reply.secret = found
        await self._outbox.put(RunRequest(credentials_reply=reply))


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

"""The control stream of one build: what the node asks is answered, what it tells is shown."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, cast

import grpc

from offload_client.build.imagesource import NodeImageSource
from offload_client.build.upload import Uploader
from offload_client.bytepipe import in_thread
from offload_core.errors import (
    ConfigError,
    ContextChangedError,
    ContextError,
    NodeLostError,
    OffloadError,
)
from offload_core.status import error_from_rpc
from offload_core.versions import call_metadata
from offload_proto.v1.node_service_pb2 import (
    ContextEntries,
    ContextEntry,
    ContextFailure,
    CredentialsReply,
    Done,
    RunRequest,
    Start,
)
from offload_proto.v1.node_service_pb2_grpc import NodeBuildsServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping
    from pathlib import Path

    from grpc import aio

    from offload_client.build.contextfiles import ContextFiles
    from offload_client.build.results import Results
    from offload_client.context.scan import TreeEntry
    from offload_client.progress.display import Display
    from offload_proto.v1.node_service_pb2 import (
        ContextRequest,
        CredentialsRequest,
        OutputReady,
        Result,
        RunResponse,
    )

ENTRIES_PER_MESSAGE = 2000
OUTBOX_MESSAGES = 32


class NodeRun:
    """One build at a node, from Start to Done.

    `result` is set when the build has ended; the stream stays open until `finish`, because the
    node serves the image and the outputs for as long.
    """

    def __init__(
        self,
        channel: aio.Channel,
        build_id: str,
        files: ContextFiles,
        display: Display,
        *,
        environment: Mapping[str, str],
        index_path: Path | None,
        results: Results,
    ) -> None:
        self._channel = channel
        self.metadata = call_metadata(("offload-build-id", build_id))
        self._files = files
        self._display = display
        self._environment = environment
        self._index_path = index_path
        self._results = results
        self.source = NodeImageSource(channel, self.metadata)
        self.heard = False
        """The node has said something, so it has taken the build."""
        self._outbox: asyncio.Queue[RunRequest | None] = asyncio.Queue(OUTBOX_MESSAGES)
        self._uploader = Uploader(channel, self.metadata, self._outbox.put, display)
        # Scanning and hashing small files is fastest in one thread at a time.
        self._scanning = asyncio.Lock()
        self._stopped = threading.Event()
        self._warned: set[str] = set()
        self._over = asyncio.Event()
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    async def run(self, start: Start) -> None:
        """Drive the stream until `finish` or until it breaks.

        Raises:
            NodeLostError: the node went away.
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
        except* grpc.RpcError as group:
            if not self._over.is_set():
                raise _first_error(group) from None
        finally:
            call.cancel()
            self._stopped.set()

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
        elif kind == "context_request":
            tasks.create_task(self._send_context(message.context_request))
        elif kind == "need_blobs":
            self._uploader.want(list(message.need_blobs.sha256))
        elif kind == "credentials_request":
            tasks.create_task(self._send_credentials(message.credentials_request))
        elif kind == "output_ready":
            tasks.create_task(self._receive_output(message.output_ready))
        elif kind == "notice":
            self._display.notice(message.notice.level, message.notice.text)
        elif kind == "result" and not self.result.done():
            self.result.set_result(message.result)

    async def _receive_output(self, ready: OutputReady) -> None:
        await self._results.receive(ready, self.source)

    async def _send_context(self, request: ContextRequest) -> None:
        try:
            if request.local_name != "context":
                raise ContextError(f"there is no build context named {request.local_name!r}")
            async with self._scanning:
                # A daemon thread: hashing a huge file must not hold up the end after Ctrl-C.
                entries = await in_thread(lambda: self._scan(request), name="context-scan")
        except OffloadError as error:
            failure = ContextFailure(
                request_id=request.request_id,
                message=error.message,
                changed=isinstance(error, ContextChangedError),
            )
            await self._outbox.put(RunRequest(context_failure=failure))
            return
        self._uploader.offer(self._files.root, entries)
        for first in range(0, max(1, len(entries)), ENTRIES_PER_MESSAGE):
            part = entries[first : first + ENTRIES_PER_MESSAGE]
            message = ContextEntries(
                request_id=request.request_id,
                entries=[_wire_entry(entry) for entry in part],
                last=first + ENTRIES_PER_MESSAGE >= len(entries),
            )
            await self._outbox.put(RunRequest(context_entries=message))

    def _scan(self, request: ContextRequest) -> list[TreeEntry]:
        from offload_client.context.scan import scan_context
        from offload_client.context.statindex import StatIndex

        with ExitStack() as stack:
            index = None
            if self._index_path is not None:
                index = stack.enter_context(StatIndex(self._index_path, self._files.root))
            entries: list[TreeEntry] = []
            scan = scan_context(
                self._files.root,
                include=list(request.include_patterns),
                exclude=list(request.exclude_patterns),
                follow=list(request.follow_paths),
                index=index,
                normalise_modes=True,
                warn=lambda text: self._display.notice("warning", text),
            )
            # Closed before the index, which is saved then.
            stack.enter_context(closing(cast("Generator[TreeEntry]", scan)))
            for entry in scan:
                if self._stopped.is_set():
                    break
                entries.append(entry)
            return entries

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


def _wire_entry(entry: TreeEntry) -> ContextEntry:
    return ContextEntry(
        path=entry.path,
        mode=entry.mode,
        size_bytes=entry.size_bytes,
        modified_at_unix_ns=entry.modified_at_ns,
        link_name=entry.link_name,
        sha256=entry.sha256 or b"",
        xattrs=entry.xattrs,
        device_major=entry.device_major,
        device_minor=entry.device_minor,
    )


def _first_error(group: BaseExceptionGroup[grpc.RpcError]) -> OffloadError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error_from_rpc(
        error,  # type: ignore[arg-type]
        peer="the node",
        unreachable=NodeLostError,
    )

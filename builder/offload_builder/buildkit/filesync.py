"""The sender of a local source: fsutil's transfer protocol on a DiffCopy call.

Source: BuildKit's session/filesync and the protocol notes in fsutil's receive.go. The receiver
asks for files (REQ) while the list (STAT) is still being sent, in any order; the contents (DATA)
of several files may be mixed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

from offload_builder.buildkit.h2.messages import (
    CANCELLED,
    INVALID_ARGUMENT,
    GrpcError,
    message_prefix,
    varint,
)
from offload_core.aio import finish
from offload_core.errors import ContextChangedError, InternalError, find_offload_error
from offload_proto.buildkit.fsutil_pb2 import Packet

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from offload_builder.buildkit.h2.server import ServerCall
    from offload_builder.buildkit.providers import LocalSource, LocalTree

MAX_READERS = 64
"""Files that are read at the same time; most of them wait for the client."""
MAX_ANNOUNCED = 16_384
"""Files that the tree has heard of and that were not sent yet; BuildKit asks for all at once."""
MAX_CHUNK = 2**20
GATHER_SECONDS = 0.002
JOINED_BYTES = 256 << 10
"""Files that are at hand are sent together, as far as they are small; many have a few KB."""
JOINED_FILES = 64
_DONE = Packet(type=Packet.PACKET_FIN).SerializeToString()
_CLOSE_SECONDS = 10.0


async def serve_diff_copy(call: ServerCall, source: LocalSource) -> None:
    """Answer one FileSync/DiffCopy call from a local source."""
    tree = await source.open(
        next(iter(header_values(call.metadata, "dir-name")), ""),
        header_values(call.metadata, "include-patterns"),
        header_values(call.metadata, "exclude-patterns"),
        header_values(call.metadata, "followpaths"),
    )
    try:
        await _Sender(call, tree).run()
    finally:
        await finish(tree.close(), _CLOSE_SECONDS)


def header_values(metadata: dict[str, list[str]], key: str) -> list[str]:
    """Return the values of a repeated header, unescaped where the daemon escaped them."""
    values = metadata.get(key, [])
    if metadata.get(f"{key}-encoded", [""])[0] in {"1", "t", "T", "true", "TRUE", "True"}:
        return [unquote_plus(value) for value in values]
    return list(values)


class _Sender:
    def __init__(self, call: ServerCall, tree: LocalTree) -> None:
        self._call = call
        self._tree = tree
        self._told = 0
        self._asked = bytearray()
        """A byte for each entry: whether it was asked for."""
        self._gathered: deque[int] = deque()
        self._announced = 0
        self._gather_wake = asyncio.Event()
        self._wanted: asyncio.Queue[int] = asyncio.Queue()
        self._helpers: list[asyncio.Task[None]] = []
        self._readers = 0
        self._idle = 0

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._start(group, self._send_stats())
                self._start(group, self._announce(group))
                await self._receive()
                # The receiver has everything: who still waits, waits for nothing.
                for task in self._helpers:
                    task.cancel()
        except BaseExceptionGroup as group_error:
            error = _first_cause(group_error)
            await self._report(error)
            raise error from group_error
        # Before it is confirmed: what BuildKit keeps must be remembered as told.
        await self._tree.delivered()
        await self._call.send([_DONE])

    def _start(self, group: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> None:
        self._helpers.append(group.create_task(work))

    async def _report(self, error: Exception) -> None:
        """Tell the receiver why; it shows this text and not the status of the call."""
        self._call.note_failure(error)
        if self._call.ended_by_peer:
            return
        known = find_offload_error(error)
        text = known.message if known else str(error)
        if known is None and not isinstance(error, GrpcError):
            text = "internal error of the build node"
        packet = Packet(type=Packet.PACKET_ERR, data=text.encode())
        await self._call.send([packet.SerializeToString()])

    async def _send_stats(self) -> None:
        async for run in self._tree.runs():
            # Counted before they are sent: a request may come while `send_framed` waits.
            self._told += run.count
            self._asked.extend(bytes(run.count))
            await self._call.send_framed(run.frames)
            await asyncio.sleep(0)
        await self._call.send([b""])

    async def _receive(self) -> None:
        while messages := await self._call.receive():
            for message in messages:
                packet = Packet.FromString(message)
                if packet.type == Packet.PACKET_REQ:
                    self._request(packet.ID)
                elif packet.type == Packet.PACKET_FIN:
                    return
                elif packet.type == Packet.PACKET_ERR:
                    text = packet.data.decode("utf-8", "replace")
                    raise GrpcError(CANCELLED, f"BuildKit could not take the files: {text}")
        raise GrpcError(CANCELLED, "BuildKit ended the transfer of files early")

    def _request(self, index: int) -> None:
        if index >= self._told or self._asked[index]:
            raise GrpcError(INVALID_ARGUMENT, f"file {index} cannot be asked for")
        self._asked[index] = 1
        self._gathered.append(index)
        self._gather_wake.set()

    async def _announce(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        next_time = 0.0
        while True:
            await self._gather_wake.wait()
            if (pause := next_time - loop.time()) > 0:
                await asyncio.sleep(pause)
            self._gather_wake.clear()
            next_time = loop.time() + GATHER_SECONDS
            room = min(len(self._gathered), MAX_ANNOUNCED - self._announced)
            indexes = [self._gathered.popleft() for _ in range(room)]
            if not indexes:
                continue
            self._announced += room
            await self._tree.requested(indexes)
            for index in indexes:
                self._wanted.put_nowait(index)
            missing = min(MAX_READERS - self._readers, self._wanted.qsize() - self._idle)
            for _ in range(missing):
                self._readers += 1
                self._start(group, self._read_files())

    async def _read_files(self) -> None:
        while True:
            self._idle += 1
            index = await self._wanted.get()
            self._idle -= 1
            if (late := await self._send_at_hand(index)) is not None:
                await self._send_file(late)
                self._note_sent(1)
            # What is at hand is sent without waiting for anything.
            await asyncio.sleep(0)

    def _note_sent(self, files: int) -> None:
        self._announced -= files
        if self._gathered:
            self._gather_wake.set()

    async def _send_at_hand(self, first: int) -> int | None:
        """Send files that need no waiting, from `first` on, in one go.

        Returns:
            The first file that has to be waited for; None when there was none so far.
        """
        pieces: list[bytes | memoryview] = []
        size = files = 0
        index: int | None = first
        while index is not None and size < JOINED_BYTES and files < JOINED_FILES:
            expected = self._tree.content_size(index)
            data = self._tree.at_hand(index) if expected > 0 else None
            if data is None:
                break
            if len(data) != expected:
                raise _wrong_size(index, len(data), expected)
            header = _data_header(index)
            pieces += (_before_data(header, len(data)), data, _end_of_data(header))
            size += len(data)
            files += 1
            index = None if self._wanted.empty() else self._wanted.get_nowait()
        if pieces:
            await self._call.send_framed(*pieces)
            self._note_sent(files)
        return index

    async def _send_file(self, index: int) -> None:
        expected, sent = self._tree.content_size(index), 0
        if expected < 0:
            raise GrpcError(INVALID_ARGUMENT, f"file {index} cannot be asked for")
        header = _data_header(index)
        end = _end_of_data(header)
        if expected == 0:
            await self._call.send_framed(end)
            return
        chunks = self._tree.read(index)
        try:
            async for chunk in chunks:
                sent += len(chunk)
                if sent > expected:
                    break
                await self._send_data(header, chunk, end if sent == expected else b"")
        finally:
            if (close := getattr(chunks, "aclose", None)) is not None:
                await close()
        if sent != expected:
            raise _wrong_size(index, sent, expected)

    async def _send_data(self, header: bytes, chunk: bytes | memoryview, end: bytes) -> None:
        """Send a part of a file and, when it is the last one, what ends the file."""
        view, left = memoryview(chunk), len(chunk)
        while left:
            piece = view[:MAX_CHUNK]
            view, left = view[MAX_CHUNK:], left - len(piece)
            await self._call.send_framed(
                _before_data(header, len(piece)), piece, b"" if left else end
            )


def _data_header(index: int) -> bytes:
    """Return the beginning of each DATA packet of a file: type and ID."""
    return b"\x08\x02\x18" + varint(index)


def _before_data(header: bytes, size: int) -> bytes:
    """Return what precedes `size` bytes of a file, the prefix of the message first."""
    length = varint(size)
    return b"%b%b\x22%b" % (message_prefix(len(header) + 1 + len(length) + size), header, length)


def _end_of_data(header: bytes) -> bytes:
    """Return the message that ends a file: a DATA packet without data."""
    return message_prefix(len(header)) + header


def _wrong_size(index: int, size: int, expected: int) -> ContextChangedError:
    return ContextChangedError(
        f"file {index} of the build context has {size} bytes, {expected} were listed;"
        " do not change files during the build"
    )


def _first_cause(group: BaseExceptionGroup[BaseException]) -> Exception:
    """Return the error to show: ours before the transport's, which follows from it."""
    known = find_offload_error(group)
    if known is not None:
        return known
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    if isinstance(leaf, Exception):
        return leaf
    return InternalError(f"the transfer ended with {type(leaf).__name__}")

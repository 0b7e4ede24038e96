"""Pulling a blob from an upstream registry: in parallel ranges, resumed when it breaks off."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import aiohttp

from offload_cache.mirror.errors import AwayError, UnfitError, UpstreamError
from offload_core.errors import DigestMismatchError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_cache.blobwriter import BlobWriter
    from offload_cache.mirror.upstream import EndpointClient

RANGE_BYTES = 16 << 20
PARALLEL_RANGES = 4
_PIECE_BYTES = 1 << 20
_ATTEMPTS = 4
_BLOB_SECONDS = 3600.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,16})-(\d{1,16})/(\d{1,16})")


class BlobPull:
    """One blob on its way from one endpoint to the disk.

    Args:
        client: the endpoint.
        repository: that has the blob.
        digest: of the blob.
        writer: takes the bytes; `run` commits it, its owner aborts it.
        max_bytes: refuse a larger blob.
    """

    def __init__(
        self,
        client: EndpointClient,
        repository: str,
        digest: str,
        writer: BlobWriter,
        max_bytes: int,
    ) -> None:
        self._client = client
        self._repository = repository
        self._digest = digest
        self._writer = writer
        self._max_bytes = max_bytes

    async def run(self) -> int:
        """Pull, verify and commit the blob; return its bytes.

        Raises:
            UpstreamError: it cannot be had here, or is not what its digest names.
            QuotaExceededError: the disk is full.
        """
        try:
            async with asyncio.timeout(_BLOB_SECONDS):
                return await self._run()
        except TimeoutError as error:
            raise AwayError(f"{self._digest} takes more than {_BLOB_SECONDS:.0f} s") from error

    async def _run(self) -> int:
        try:
            answer = await self._request(0, RANGE_BYTES)
        except _RangeRefusedError:
            answer = await self._client.request("GET", self._repository, self._path)
        try:
            if answer.status == 206:
                size_bytes = await self._pull_ranges(answer)
            else:
                size_bytes = await self._pull_whole(answer)
        finally:
            answer.release()
        try:
            await self._writer.commit(self._digest, size_bytes)
        except DigestMismatchError as error:
            raise UnfitError(f"{self._digest} is damaged upstream: {error.message}") from error
        return size_bytes

    @property
    def _path(self) -> str:
        return f"blobs/{self._digest}"

    async def _request(self, offset: int, length: int) -> aiohttp.ClientResponse:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            return await self._client.request("GET", self._repository, self._path, headers)
        except UpstreamError as error:
            if offset == 0 and str(error).endswith(" 416"):
                raise _RangeRefusedError(str(error)) from error  # an empty blob has no first byte
            raise

    async def _pull_whole(self, answer: aiohttp.ClientResponse) -> int:
        """Take a blob in order from an endpoint that knows no ranges."""
        self._check_size(answer.content_length or 0)
        size_bytes = 0

        async def take(piece: bytearray) -> None:
            nonlocal size_bytes
            size_bytes += len(piece)
            self._check_size(size_bytes)
            await self._writer.write(piece)

        await _read(answer, take)
        await self._writer.flush()
        if answer.content_length is not None and answer.content_length != size_bytes:
            raise AwayError("the answer is shorter than announced")
        return size_bytes

    async def _pull_ranges(self, first: aiohttp.ClientResponse) -> int:
        size_bytes = self._range_total(first, 0)
        self._check_size(size_bytes)
        offsets = iter(range(0, size_bytes, RANGE_BYTES))

        async def some() -> None:
            for offset in offsets:
                length = min(RANGE_BYTES, size_bytes - offset)
                await self._pull_range(offset, length, first if offset == 0 else None)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(PARALLEL_RANGES, -(-size_bytes // RANGE_BYTES))):
                    group.create_task(some())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return size_bytes

    async def _pull_range(
        self, offset: int, length: int, answer: aiohttp.ClientResponse | None
    ) -> None:
        end = offset + length

        async def take(piece: bytearray) -> None:
            nonlocal offset
            if offset + len(piece) > end:
                raise UnfitError("a range has more bytes than asked for")
            await self._writer.write_at(offset, piece)
            offset += len(piece)

        for attempt in range(_ATTEMPTS):
            try:
                current = answer or await self._request(offset, end - offset)
                answer = None
                try:
                    self._range_total(current, offset)
                    await _read(current, take)
                finally:
                    current.release()
            except AwayError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)
            if offset == end:
                return
        raise AwayError("the registry's answers are shorter than announced")

    @staticmethod
    def _range_total(answer: aiohttp.ClientResponse, offset: int) -> int:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status != 206 or found is None or int(found[1]) != offset:
            raise UnfitError("the registry does not answer the range that was asked for")
        return int(found[3])

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise UnfitError(f"the blob has more than {self._max_bytes} bytes")


class _RangeRefusedError(UpstreamError):
    """The first bytes cannot be asked for."""


async def _read(
    answer: aiohttp.ClientResponse, take: Callable[[bytearray], Awaitable[None]]
) -> None:
    """Pass the body on in pieces of about 1 MiB; what came before a break is passed on, too."""
    piece = bytearray()
    broken: Exception | None = None
    try:
        async for data in answer.content.iter_any():
            piece += data
            if len(piece) >= _PIECE_BYTES:
                await take(piece)
                piece = bytearray()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        broken = error
    if piece:
        await take(piece)
    if broken is not None:
        raise AwayError(f"the transfer broke off: {type(broken).__name__}") from broken

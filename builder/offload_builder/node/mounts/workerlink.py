"""The node's side of a worker process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any, Self

from offload_builder.node.mounts.worker import HEADER
from offload_core.errors import InternalError, QuotaExceededError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_HEAD_BYTES = 16 << 20
_MAX_BODY_BYTES = 512 << 20
_BUFFER_BYTES = 1 << 20
_END_SECONDS = 5.0


class MountWorker:
    """A process that works on the files of one mount; an async context manager that ends it.

    Args:
        root: the mount's directory.
        index: file with what is known of it.
        blobs: directory of the node's blobs, for unpacking.
        nice: lowers its share of the processor.
        id_base: user and group that are number 0 in what is stored, where the files belong to a
            user namespace; else 0.
    """

    def __init__(
        self,
        root: Path,
        *,
        index: Path | None = None,
        blobs: Path | None = None,
        nice: int = 0,
        id_base: int = 0,
    ) -> None:
        self._common = {
            "root": str(root),
            "index": str(index) if index else "",
            "blobs": str(blobs) if blobs else "",
            "nice": nice,
            "id_base": id_base,
        }
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "offload_builder.node.mounts.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_BUFFER_BYTES,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()

    async def start(self, do: str, **values: Any) -> None:
        """Give the first order.

        Raises:
            InternalError: the process is gone.
        """
        await self.order(do, **self._common, **values)

    async def order(self, do: str, **values: Any) -> None:
        """Give an order.

        Raises:
            InternalError: the process is gone.
        """
        stream = self._process.stdin if self._process is not None else None
        if stream is None:
            raise InternalError("the worker of a cache mount was not started")
        try:
            stream.write(json.dumps({"do": do, **values}).encode() + b"\n")
            await stream.drain()
        except OSError as error:
            raise InternalError("the worker of a cache mount has ended") from error

    async def answer(self) -> tuple[dict[str, Any], bytes]:
        """Return the next answer.

        Raises:
            QuotaExceededError: the mount holds more than it may.
            InternalError: it did not work, or the process is gone.
        """
        stream = self._process.stdout if self._process is not None else None
        if stream is None:
            raise InternalError("the worker of a cache mount was not started")
        try:
            head_size, body_size = HEADER.unpack(await stream.readexactly(HEADER.size))
            if head_size > _MAX_HEAD_BYTES or body_size > _MAX_BODY_BYTES:
                raise InternalError("the worker of a cache mount said too much")
            head: dict[str, Any] = json.loads(await stream.readexactly(head_size))
            body = await stream.readexactly(body_size)
        except asyncio.IncompleteReadError as error:
            raise InternalError("the worker of a cache mount has ended") from error
        if "error" in head:
            kind = QuotaExceededError if head.get("reason") == "too-large" else InternalError
            raise kind(f"the cache mount could not be handled: {head['error']}")
        return head, body

"""Stores what a cache mount holds: new content as blobs, then what names all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from offload_builder.node.mounts.workerlink import MountWorker
from offload_core.digest import sha256_digest
from offload_core.errors import InternalError

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from offload_cache.tiered import ProjectStore

log = structlog.get_logger(__name__)

_NICE = 10


@dataclass(frozen=True, slots=True)
class Packed:
    """A mount as it lies in the node's store.

    Attributes:
        tree: digest of its tree.
        blobs: digest and bytes of the tree and all pieces.
        files: entries of the tree.
        content_bytes: of all files.
        new_bytes: of the blobs that were not stored before.
    """

    tree: str
    blobs: tuple[tuple[str, int], ...]
    files: int
    content_bytes: int
    new_bytes: int


class _PiecesGoneError(Exception):
    """Content that was stored once is stored no more."""


async def pack(
    store: ProjectStore,
    root: Path,
    index: Path,
    max_bytes: int,
    leases: ExitStack,
    *,
    id_base: int = 0,
) -> Packed:
    """Store a mount that no step uses.

    Args:
        store: takes the blobs.
        root: the mount's directory.
        index: file with what is known of it; brought up to date.
        max_bytes: bound of its content.
        leases: keeps new blobs on the disk until they are queued for the shared store.
        id_base: see `MountWorker`.

    Raises:
        QuotaExceededError: the mount is larger, or the disk is full.
        InternalError: it could not be read, or a file changed meanwhile.
    """
    try:
        return await _pack(store, root, index, max_bytes, leases, id_base)
    except _PiecesGoneError as gone:
        log.info("mounts.pieces.gone", missing=str(gone))
        index.unlink(missing_ok=True)
    try:
        return await _pack(store, root, index, max_bytes, leases, id_base)
    except _PiecesGoneError as gone:
        raise InternalError("content of the cache mount was removed while it was stored") from gone


async def _pack(
    store: ProjectStore,
    root: Path,
    index: Path,
    max_bytes: int,
    leases: ExitStack,
    id_base: int,
) -> Packed:
    new: dict[str, int] = {}
    async with MountWorker(root, index=index, nice=_NICE, id_base=id_base) as worker:
        await worker.start("pack", max_bytes=max_bytes)
        while True:
            head, body = await worker.answer()
            digest = str(head.get("piece") or sha256_digest(body))
            leases.enter_context(store.lease([digest]))
            await store.put_blob(body, digest)
            new[digest] = len(body)
            if "tree" in head:
                break
        pieces = {str(piece): int(size) for piece, size in head["pieces"]}
        for piece in pieces:
            if piece not in new and await store.stat_blob(piece) is None:
                raise _PiecesGoneError(piece)
        await worker.order("keep")
        await worker.answer()
    return Packed(
        tree=digest,
        blobs=((digest, len(body)), *pieces.items()),
        files=int(head["files"]),
        content_bytes=int(head["content_bytes"]),
        new_bytes=sum(new.values()),
    )

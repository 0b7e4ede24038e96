"""Removal of documents: they count no more, but a copy protects their blobs for the grace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from offload_cache.contributions import MAX_CONTRIBUTION_BYTES
from offload_cache.images import MAX_IMAGE_BYTES
from offload_cache.keys import contribution_key, image_key, removed_image_key
from offload_core.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from offload_cache.objectstore import ObjectStore


_MOVE_SECONDS = 300.0


async def retire_contribution(
    objects: ObjectStore,
    project_id: str,
    scope: str,
    contribution_id: str,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Remove one contribution; fine when it is gone already.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    await _move(
        objects,
        contribution_key(project_id, scope, contribution_id),
        contribution_key(project_id, scope, contribution_id, kind="removed"),
        MAX_CONTRIBUTION_BYTES,
        clock,
    )


async def retire_image(
    objects: ObjectStore,
    project_id: str,
    digest: str,
    may_delete: Callable[[], Awaitable[bool]],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Remove an image; its manifest's digest must be condemned, or a new push may be lost.

    Args:
        objects: the shared store.
        project_id: the project.
        digest: of the manifest.
        may_delete: whether the list of what is condemned still counts; asked before the deletion.
        clock: monotonic, in seconds.

    Raises:
        CacheUnavailableError: the store does not answer.
    """
    await _move(
        objects,
        image_key(project_id, digest),
        removed_image_key(project_id, digest),
        MAX_IMAGE_BYTES,
        clock,
        may_delete,
    )


async def _always() -> bool:
    return True


async def _move(
    objects: ObjectStore,
    key: str,
    to: str,
    max_bytes: int,
    clock: Callable[[], float],
    may_delete: Callable[[], Awaitable[bool]] = _always,
) -> None:
    try:
        data = await objects.read_bytes(key, max_bytes=max_bytes)
    except NotFoundError:
        return
    while True:
        started = clock()
        await objects.write_bytes(to, data)
        if clock() - started <= _MOVE_SECONDS:
            # The grace counts from the copy: it must not have begun long before the removal.
            break
    if await may_delete():
        await objects.delete(key)

"""Saved images on their way to the shared store: the gateway hears when they are there.

Only then another node can give them. The queue of uploads outlives the node's process, so what
was on its way is waited for after a restart, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from offload_cache.keys import image_key
from offload_core.aio import for_each
from offload_core.errors import CacheUnavailableError
from offload_proto.v1.builds_service_pb2 import BuildState
from offload_proto.v1.nodes_service_pb2 import BuildUpdate

if TYPE_CHECKING:
    from offload_builder.node.endedbuilds import EndedBuild, EndedBuilds
    from offload_builder.node.gatewaylink import GatewayLink
    from offload_cache.nodestore import NodeStore

log = structlog.get_logger(__name__)

SAVE_SECONDS = 6 * 3600.0
"""An image may be large, and the shared store away for a while."""
PARALLEL = 8


class ImageKeeping:
    """Waits for saved images.

    Args:
        store: of all projects.
        ended: the builds that are kept.
        link: to the gateway.
    """

    def __init__(self, store: NodeStore, ended: EndedBuilds, link: GatewayLink) -> None:
        self._store = store
        self._ended = ended
        self._link = link

    async def confirm_left(self) -> None:
        """Wait for what a former process began to save."""
        await for_each(self._ended.all_unsaved(), self.confirm, parallel=PARALLEL)

    async def confirm(self, ended: EndedBuild) -> None:
        """Wait until the shared store has the image of a build, and say so."""
        record, uploads = ended.record, self._store.uploads
        if uploads is None:
            return
        if record.publication:
            await uploads.wait_published(record.publication, SAVE_SECONDS)
        # The last to arrive, after everything that it names; another build may have brought it.
        if not await self._is_there(image_key(record.project_id, ended.image_digest)):
            log.warning("image.save.failed", build_id=record.build_id, digest=ended.image_digest)
            return
        self._ended.stored(ended)
        log.info("image.saved", build_id=record.build_id, digest=ended.image_digest)
        self._link.report(
            BuildUpdate(
                build_id=record.build_id,
                state=BuildState.BUILD_STATE_SUCCEEDED,
                image_digest=ended.image_digest,
                image_saved=True,
            )
        )

    async def _is_there(self, key: str) -> bool:
        objects = self._store.objects
        try:
            return objects is not None and await objects.stat(key) is not None
        except CacheUnavailableError:
            return False

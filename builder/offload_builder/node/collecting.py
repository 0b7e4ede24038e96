"""What a node keeps in the shared store, and the loop that removes the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload_cache.collection.collector import Collector
from offload_cache.collection.loop import CollectionLoop
from offload_cache.collection.plan import Limits

if TYPE_CHECKING:
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.projectlimits import LimitBook
    from offload_cache.s3store import S3Store


def collection_loop(
    objects: S3Store, config: NodeConfig, book: LimitBook, holder: str
) -> CollectionLoop:
    """Return the loop that collects in the shared store, for as long as its context is open."""
    collector = Collector(
        objects,
        holder,
        lambda project_id: shared_limits(config, book, project_id),
        pool_keep_bytes=config.cache_shared_pool_keep,
        grace_seconds=config.cache_grace,
    )
    return CollectionLoop(objects, collector, config.cache_collect_every)


def shared_limits(config: NodeConfig, book: LimitBook, project_id: str) -> Limits:
    """Return what a project may keep in the shared store: its own bounds, else this node's."""
    own = book.of(project_id)
    return Limits(
        keep_bytes=own.shared_keep_bytes or config.cache_shared_keep,
        idle_seconds=own.shared_idle_seconds or config.cache_shared_idle,
        context_keep_bytes=config.context_shared_keep,
        context_idle_seconds=config.context_shared_idle,
    )

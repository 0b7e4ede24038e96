"""Usage, pruning and promotion of the layer cache at a node, as the gateway asks for them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from offload_cache.admin.layercache import LayerCacheAdmin
from offload_cache.admin.selection import EntryFilter, measure_scopes
from offload_cache.admin.summaries import SharedContents
from offload_cache.keys import check_project_id
from offload_core.errors import CacheUnavailableError, NotFoundError, OffloadError
from offload_proto.v1.cache_service_pb2 import (
    CacheUsage,
    NodeUsage,
    PromoteResult,
    PrunedEntry,
    PruneResult,
    ScopeUsage,
)
from offload_proto.v1.nodes_service_pb2 import CacheTaskReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from offload_builder.node.cachedesk import CacheDesk
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.project import ProjectRuntime
    from offload_builder.node.projectpool import ProjectPool
    from offload_cache.admin.selection import ScopeSize
    from offload_cache.admin.summaries import EntrySummary
    from offload_cache.nodebounds import NodeBounds
    from offload_cache.nodestore import NodeStore
    from offload_proto.v1.nodes_service_pb2 import CacheTask

log = structlog.get_logger(__name__)

DISK_USAGE_SECONDS = 10.0
"""How long a BuildKit may take to say what it keeps."""


class CacheTasks:
    """Handlers for the cache desk. Belongs to the event loop."""

    def __init__(
        self,
        node_id: str,
        config: NodeConfig,
        store: NodeStore,
        projects: ProjectPool,
        bounds: NodeBounds,
        shared_keep_bytes: Callable[[str], int],
    ) -> None:
        """Set what is measured.

        Args:
            node_id: name of this node.
            config: of this node.
            store: its cache.
            projects: what runs here.
            bounds: knows the sizes of projects that are not open.
            shared_keep_bytes: bound of a project in the shared store; 0 for none.
        """
        self._node_id = node_id
        self._config = config
        self._store = store
        self._projects = projects
        self._bounds = bounds
        self._shared_keep_bytes = shared_keep_bytes
        self._admins: dict[str, LayerCacheAdmin] = {}

    def register(self, desk: CacheDesk) -> None:
        """Make the desk answer with these handlers."""
        desk.register("usage", self.usage)
        desk.register("prune", self.prune)
        desk.register("promote", self.promote)
        desk.register("why", self.why)

    async def _admin(self, project_id: str) -> LayerCacheAdmin:
        cache = await self._store.project(project_id)
        admin = self._admins.get(project_id)
        if admin is None:
            admin = LayerCacheAdmin(cache.store, cache.scopes, self._store.in_thread)
            self._admins[project_id] = admin
        return admin

    # -- usage

    async def usage(self, task: CacheTask) -> CacheTaskReply:
        """Measure this node, and the shared store unless another node does."""
        project_id = check_project_id(task.project_id)
        usage = CacheUsage()
        usage.nodes.add().CopyFrom(await self._node_usage(project_id))
        if not (task.usage.node_only and self._store.objects is not None):
            await self._measure(usage, await self._admin(project_id), project_id)
        return CacheTaskReply(usage=usage)

    async def _measure(self, usage: CacheUsage, admin: LayerCacheAdmin, project_id: str) -> None:
        try:
            contents, collected_at = await admin.measure()
        except CacheUnavailableError as error:
            usage.shared_problem = error.message
            contents, collected_at = SharedContents(entries=await admin.own_entries()), None
        for size in measure_scopes(contents.entries):
            usage.scopes.add().CopyFrom(_scope_usage(size))
        if admin.has_shared_store:
            usage.shared_bytes, usage.shared_objects = contents.total_bytes, contents.objects
            usage.garbage_bytes = contents.garbage_bytes
            usage.shared_keep_bytes = self._shared_keep_bytes(project_id)
            if collected_at is not None:
                usage.collected_at.FromDatetime(collected_at)

    async def _node_usage(self, project_id: str) -> NodeUsage:
        runtimes = [item for item in self._projects.running() if item.project_id == project_id]
        uploads = self._store.uploads
        buildkit = await asyncio.gather(*(_buildkit_bytes(item) for item in runtimes))
        stores = {id(item.context_store): item.context_store for item in runtimes}
        context = await asyncio.gather(*(item.used_bytes() for item in stores.values()))
        return NodeUsage(
            node_id=self._node_id,
            blob_bytes=await self._bounds.used_bytes(project_id),
            blob_keep_bytes=self._store.max_bytes(project_id) or 0,
            buildkit_bytes=sum(buildkit),
            buildkit_keep_bytes=self._config.buildkit_keep,
            context_bytes=sum(context),
            context_keep_bytes=self._config.context_keep,
            pending_uploads=0 if uploads is None else await uploads.pending_count(project_id),
        )

    # -- why

    async def why(self, task: CacheTask) -> CacheTaskReply:
        """Explain which steps of a build ran, from what this node or another one has kept."""
        project_id = check_project_id(task.project_id)
        runtimes = [item for item in self._projects.running() if item.project_id == project_id]
        # Members and protected builds share a desk, untrusted members have their own.
        desks = {id(item.why): item.why for item in runtimes}
        if all(item.domain.is_untrusted for item in runtimes):
            main = (await self._projects.runtime(project_id)).why
            desks[id(main)] = main
        for desk in desks.values():
            if (found := await desk.answer(task.why)) is not None:
                return CacheTaskReply(why=found)
        raise NotFoundError(
            f"nothing is kept of the steps of build {task.why.build_id}; "
            "the newest builds of each project can be explained"
        )

    # -- prune and promote

    async def prune(self, task: CacheTask) -> CacheTaskReply:
        """Remove entries, or say what would go."""
        wanted = task.prune.filter
        admin = await self._admin(task.project_id)
        unused_for = None
        if wanted.HasField("unused_for"):
            seconds = wanted.unused_for.seconds + wanted.unused_for.nanos / 1e9
            unused_for = timedelta(seconds=seconds)
        pruned = await admin.prune(
            EntryFilter(
                scope=_scope(task.project_id, wanted.scope) if wanted.scope else "",
                unused_for=unused_for,
                keep_bytes=wanted.keep_bytes,
            ),
            dry_run=task.prune.dry_run,
            node_only=task.prune.node_only,
        )
        result = PruneResult(
            entries=[_pruned_entry(entry) for entry in pruned.entries],
            freed_bytes=pruned.freed_bytes,
        )
        return CacheTaskReply(prune=result)

    async def promote(self, task: CacheTask) -> CacheTaskReply:
        """Copy entries of one scope to another."""
        wanted, project_id = task.promote, task.project_id
        admin = await self._admin(project_id)
        promoted = await admin.promote(
            _scope(project_id, wanted.from_scope),
            _scope(project_id, wanted.to_scope),
            node_only=wanted.node_only,
        )
        log.info(
            "cache.entries.promoted",
            project_id=project_id,
            from_scope=wanted.from_scope,
            to_scope=wanted.to_scope,
            entries=promoted.entries,
            refused=promoted.refused,
            member=wanted.member,
            role=wanted.role,
        )
        return CacheTaskReply(
            promote=PromoteResult(entries=promoted.entries, refused=promoted.refused)
        )


async def _buildkit_bytes(runtime: ProjectRuntime) -> int:
    """Return what a project's BuildKit keeps; 0 when it does not run or does not say."""
    try:
        async with asyncio.timeout(DISK_USAGE_SECONDS):
            return await runtime.buildkit_bytes()
    except (OffloadError, TimeoutError) as error:
        log.warning("buildkit.usage.unknown", project_id=runtime.project_id, error=str(error))
        return 0


def _scope(project_id: str, name: str) -> str:
    return f"{project_id}/{name}"


def _name(scope: str) -> str:
    """Return the name of a scope within its project."""
    return scope.partition("/")[2]


def _scope_usage(size: ScopeSize) -> ScopeUsage:
    newest = size.entries[0]
    usage = ScopeUsage(
        scope=_name(size.scope),
        entries=len(size.entries),
        layer_bytes=size.layer_bytes,
        own_bytes=size.own_bytes,
        member=newest.writer.member,
        build_id=newest.writer.build_id,
    )
    usage.written_at.FromDatetime(newest.written_at)
    usage.used_at.FromDatetime(size.used_at)
    return usage


def _pruned_entry(entry: EntrySummary) -> PrunedEntry:
    pruned = PrunedEntry(
        scope=_name(entry.scope),
        entry_id=entry.entry_id,
        build_id=entry.writer.build_id,
        member=entry.writer.member,
        layer_bytes=entry.layer_bytes,
    )
    pruned.written_at.FromDatetime(entry.written_at)
    return pruned

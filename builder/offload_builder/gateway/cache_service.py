"""CacheService: usage, pruning and promotion of the layer cache for members."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from offload_builder.gateway.cachegain import cache_gain
from offload_builder.gateway.cachetrust import (
    CacheMember,
    CacheTrust,
    may_promote,
    may_prune,
    scope_id,
)
from offload_builder.gateway.tokens import role_name
from offload_core.errors import UsageError
from offload_proto.v1 import cache_service_pb2 as cache_pb
from offload_proto.v1 import nodes_service_pb2 as nodes_pb
from offload_proto.v1.cache_service_pb2_grpc import CacheServiceServicer

if TYPE_CHECKING:
    from grpc import aio

    from offload_builder.gateway.access import Access, Caller
    from offload_builder.gateway.cachework import CacheWork
    from offload_builder.gateway.config import GatewayConfig
    from offload_builder.gateway.history import BuildRecord, History
    from offload_builder.gateway.members import Members
    from offload_builder.gateway.store import Store

log = structlog.get_logger(__name__)

COMPARED_BUILDS = 50
"""Earlier builds that a node may compare a build with."""
_PROJECTS_AT_ONCE = 4


class CacheService(CacheServiceServicer):
    """Unpacks, authorises, calls, packs."""

    def __init__(
        self,
        config: GatewayConfig,
        access: Access,
        members: Members,
        store: Store,
        history: History,
        work: CacheWork,
    ) -> None:
        self._trust = CacheTrust(config.default_branches, config.protected_branches)
        self._access = access
        self._members = members
        self._store = store
        self._history = history
        self._work = work

    async def Usage(  # noqa: N802
        self, request: cache_pb.UsageRequest, context: aio.ServicerContext[Any, Any]
    ) -> cache_pb.UsageResponse:
        """Return sizes and gain of one project, or of all that the caller may use."""
        caller = await self._access.member(context)
        if request.project_id:
            names = [await self._project(caller, request.project_id)]
        else:
            known = await self._members.list_projects()
            names = [item.project_id for item in known if caller.token.may_use(item.project_id)]
        slots = asyncio.Semaphore(_PROJECTS_AT_ONCE)
        hung: set[str] = set()

        async def one(project_id: str) -> cache_pb.ProjectUsage:
            async with slots:
                usage, silent = await self._work.usage(project_id, hung)
                gain = await cache_gain(self._store, project_id)
            return cache_pb.ProjectUsage(
                project_id=project_id, usage=usage, gain=gain, silent_node_ids=silent
            )

        projects = await asyncio.gather(*(one(name) for name in names))
        return cache_pb.UsageResponse(projects=projects)

    async def Prune(  # noqa: N802
        self, request: cache_pb.PruneRequest, context: aio.ServicerContext[Any, Any]
    ) -> cache_pb.PruneResponse:
        """Remove entries of scopes that the caller may write."""
        caller = await self._access.member(context)
        project_id = await self._project(caller, request.project_id)
        wanted = cache_pb.PruneFilter()
        wanted.CopyFrom(request.filter)
        _check_filter(wanted)
        may_prune(CacheMember.behind(caller.token), wanted.scope, self._trust)
        if wanted.scope:
            wanted.scope = _element(project_id, wanted.scope)
        else:
            wanted.all_scopes = True
        response = await self._work.prune(project_id, wanted, dry_run=request.dry_run)
        if not request.dry_run:
            log.info(
                "cache.pruned",
                project_id=project_id,
                scope=wanted.scope,
                entries=len(response.result.entries),
                freed_bytes=response.result.freed_bytes,
                by=caller.token.name,
            )
        return response

    async def Promote(  # noqa: N802
        self, request: cache_pb.PromoteRequest, context: aio.ServicerContext[Any, Any]
    ) -> cache_pb.PromoteResponse:
        """Copy the entries of a branch to another."""
        caller = await self._access.member(context)
        project_id = await self._project(caller, request.project_id)
        from_name, to_name = may_promote(
            CacheMember.behind(caller.token), request.from_scope, request.to_scope, self._trust
        )
        task = nodes_pb.PromoteTask(
            from_scope=_element(project_id, from_name),
            to_scope=_element(project_id, to_name),
            member=caller.token.name,
            role=role_name(caller.token.role),
        )
        result = await self._work.promote(project_id, task)
        log.info(
            "cache.promoted",
            project_id=project_id,
            from_scope=task.from_scope,
            to_scope=task.to_scope,
            entries=result.entries,
            refused=result.refused,
            by=caller.token.name,
        )
        return cache_pb.PromoteResponse(result=result)

    async def Why(  # noqa: N802
        self, request: cache_pb.WhyRequest, context: aio.ServicerContext[Any, Any]
    ) -> cache_pb.WhyResponse:
        """Explain which steps of a build were not cached."""
        caller = await self._access.member(context)
        record = await self._history.resolve(request.build_id, caller.visible_projects())
        task = nodes_pb.WhyTask(
            build_id=record.build_id,
            earlier_build_ids=await self._earlier(record),
            step=request.step[:1000],
        )
        result = await self._work.why(record.node_id, record.project_id, task)
        return cache_pb.WhyResponse(result=result)

    async def _earlier(self, record: BuildRecord) -> list[str]:
        """Return earlier builds of the same definition, those of the same branch first."""
        found = await self._history.earlier_alike(record, limit=COMPARED_BUILDS)
        found.sort(key=lambda other: other.vcs_branch != record.vcs_branch)
        return [other.build_id for other in found]

    async def _project(self, caller: Caller, project_id: str) -> str:
        if not project_id:
            raise UsageError("name a project; set it with --project or in offload.toml")
        caller.token.check_project(project_id)
        await self._members.project(project_id, visible_to=caller.token)
        return project_id


def _element(project_id: str, name: str) -> str:
    """Return the part of a scope's identifier that names it within its project."""
    return scope_id(project_id, name).partition("/")[2]


def _check_filter(wanted: cache_pb.PruneFilter) -> None:
    """Refuse a filter that says nothing, or contradicts itself."""
    if not (wanted.scope or wanted.all_scopes or wanted.HasField("unused_for")):
        raise UsageError("say what to prune: a scope, all scopes, or what was unused for how long")
    if wanted.scope and wanted.all_scopes:
        raise UsageError("--scope and --all-scopes exclude each other")
    if wanted.keep_bytes < 0 or wanted.unused_for.seconds < 0:
        raise UsageError("neither a size nor a time may be negative")

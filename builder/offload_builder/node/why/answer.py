"""Answers a question of the gateway: which steps of a build ran, and why."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from offload_builder.node.pagestore import PageStore
from offload_builder.node.why.changes import changed_paths, page_entries
from offload_builder.node.why.explain import CacheFacts, Comparison, explain
from offload_cache.keys import contributions_prefix
from offload_core.errors import CacheUnavailableError, NotFoundError, UsageError
from offload_proto.v1.cache_service_pb2 import WhyResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload_builder.node.contextshare import SharedContext
    from offload_builder.node.contextstore import ContextStore
    from offload_builder.node.why.trace import BuildTrace
    from offload_builder.node.why.tracestore import TraceStore
    from offload_cache.objectstore import ObjectInfo, ObjectStore
    from offload_proto.v1.nodes_service_pb2 import WhyTask

MAX_EARLIER = 50
_MAX_LISTED = 1_000
_SECONDS = 5.0


class WhyDesk:
    """Explains builds of one project.

    Args:
        project_id: the project.
        traces: of its builds.
        store: of its context, with the pages of listings.
        shared: the same of other nodes; None without a shared store.
        objects: the shared store; None without one.
    """

    def __init__(
        self,
        project_id: str,
        traces: TraceStore,
        store: ContextStore,
        shared: SharedContext | None,
        objects: ObjectStore | None,
    ) -> None:
        self._project_id = project_id
        self._traces = traces
        self._store = store
        self._shared = shared
        self._objects = objects

    async def answer(self, task: WhyTask) -> WhyResult | None:
        """Return the explanation, None when nothing is kept of the build.

        Raises:
            NotFoundError: the build has no such step.
        """
        now = await self._traces.find(task.build_id)
        if now is None:
            return None
        before = await self._nearest(now, task.earlier_build_ids[:MAX_EARLIER])
        comparison = await self._compare(now, before)
        steps = explain(comparison, task.step)
        if task.step and not steps:
            raise NotFoundError(f'build {task.build_id} has no step "{task.step[:100]}"')
        result = WhyResult(build_id=now.build_id, steps=steps)
        if before is not None:
            result.earlier_build_id = before.build_id
            result.earlier_member = before.member
            result.earlier_at.FromDatetime(before.created_at)
        return result

    async def _nearest(self, now: BuildTrace, build_ids: Sequence[str]) -> BuildTrace | None:
        """Return the first of some builds that is one of the same thing."""
        for build_id in build_ids:
            found = await self._traces.find(build_id)
            if found is not None and found.steps and found.key == now.key:
                return found
        return None

    async def _compare(self, now: BuildTrace, before: BuildTrace | None) -> Comparison:
        if before is None:
            return Comparison(now)
        paths: dict[str, dict[str, str]] = {}
        unknown: dict[str, str] = {}
        pages = PageStore(self._store, self._shared)
        try:
            for name in {source.name for source in now.sources}:
                new = _pages_of(now, name)
                old = _pages_of(before, name)
                entries = await self._entries(pages, [page for page in new if page not in old])
                others = await self._entries(pages, [page for page in old if page not in new])
                if entries is None or others is None:
                    differ = len(set(new).symmetric_difference(old))
                    unknown[name] = f"{differ} of {len(new)} groups of files differ"
                else:
                    paths[name] = changed_paths(entries, others)
        finally:
            pages.close()
        return Comparison(now, before, paths, unknown, await self._facts(before))

    @staticmethod
    async def _entries(pages: PageStore, digests: list[str]) -> dict[str, bytes] | None:
        """Return the entries of pages by path; None when a page is not to be had."""
        wanted = [bytes.fromhex(digest) for digest in digests]
        if len(await pages.find(wanted)) < len(set(wanted)):
            return None
        entries: dict[str, bytes] = {}
        while wanted:
            loaded = await pages.load(wanted)
            if not loaded:
                return None
            try:
                for data in loaded.values():
                    entries |= page_entries(data)
            except UsageError:
                return None
            wanted = [digest for digest in wanted if digest not in loaded]
        return entries

    async def _facts(self, before: BuildTrace) -> CacheFacts:
        """Look for what the earlier build added to the cache of the pool."""
        if self._objects is None or not before.write_scope:
            return CacheFacts(published_at=before.ended_at)
        published = await self._find(before, "contributions")
        removed = await self._find(before, "removed")
        if published is None and removed is None:
            return CacheFacts()
        at = published or removed
        return CacheFacts(
            published_at=at.modified_at if published and at else before.ended_at,
            removed_at=removed.modified_at if removed and not published else None,
        )

    async def _find(self, before: BuildTrace, kind: str) -> ObjectInfo | None:
        if self._objects is None:
            return None
        with contextlib.suppress(CacheUnavailableError, UsageError):
            prefix = contributions_prefix(self._project_id, before.write_scope, kind)
            found = await self._objects.list_objects(prefix, limit=_MAX_LISTED, timeout=_SECONDS)
            for info in found:
                if info.key.endswith(f"-{before.build_id}"):
                    return info
        return None


def _pages_of(trace: BuildTrace, name: str) -> list[str]:
    return [page for source in trace.sources if source.name == name for page in source.pages]

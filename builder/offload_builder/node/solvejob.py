"""A build of our own client: the node has BuildKit solve it with what the client sends.

Its cache is exported in a second solve, after the client has its result.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.failure import SolveFailure
from offload_builder.buildkit.providers import SessionProviders
from offload_builder.buildkit.session import BkSession
from offload_builder.buildkit.solve import Attributed, SolveResult, SolveSpec
from offload_builder.node.cacheplan import (
    cache_stores,
    local_export_index,
    other_exports,
    other_imports,
)
from offload_builder.node.contextplan import layout_images, layout_stores
from offload_builder.node.job import BuildJob
from offload_builder.node.localsource import BuildContext
from offload_builder.node.nearimages import NearImages
from offload_builder.node.needs import LOGINS, SECRETS
from offload_builder.node.ocilayout import ClientLayouts
from offload_builder.node.outputs import Outputs
from offload_builder.node.provenance import note_provenance
from offload_builder.node.solveplan import (
    EXPORT_ATTRIBUTES,
    check_spec,
    exporters,
    frontend_attributes,
    likeness,
    shared_key_base,
)
from offload_builder.node.sshagents import ClientAgents
from offload_cache.registry.grants import IMAGE
from offload_core.aio import TaskSet
from offload_core.errors import NodeLostError, OffloadError
from offload_proto.v1.build_spec_pb2 import ImageDescriptor
from offload_proto.v1.builds_service_pb2 import CacheState
from offload_proto.v1.node_service_pb2 import Success

if TYPE_CHECKING:
    from offload_proto.v1.node_service_pb2 import Failure

log = structlog.get_logger(__name__)

EXPORT_SECONDS = 1800.0


class SolveJob(BuildJob):
    """`run` lasts from the ticket until BuildKit has solved the build, or could not."""

    _session: BkSession
    _shared_key = ""
    _source: BuildContext | None = None
    _layouts: ClientLayouts | None = None
    _agents: ClientAgents | None = None

    async def _run(self) -> Success | Failure:
        try:
            return await self._build()
        finally:
            if self._source is not None:
                self._record.read(self._source.told())

    async def _build(self) -> Success | Failure:
        spec = self._start.spec
        check_spec(spec)
        self._stack.push_async_callback(self.secrets.close)
        self.secrets.fetch()
        prefetching = TaskSet()
        self._stack.push_async_callback(prefetching.close)
        prefetching.start(self._prefetch(), name=f"prefetch.{self.build_id}")
        await self._prepare()
        if spec.save_image and self._runtime.uploads is None:
            await self.link.notice(
                "this pool has no shared store: the image is kept at its node for a while only"
            )
        plan = exporters(spec, self.cache.image_name)
        self._outputs = Outputs(self.link, plan)
        self._source = BuildContext(
            self.link,
            self.content,
            self._runtime.context_store,
            self._runtime.times,
            self._start.inline_files,
            self._shared_key,
            self.stats,
            self.needs,
        )
        self._stack.push_async_callback(self._source.close)
        if spec.ssh_ids:
            self._agents = ClientAgents(self.link, spec.ssh_ids)
        if stores := layout_stores(spec) | cache_stores(spec):
            near = NearImages(
                self._runtime.images, self.member, self._runtime.cache.store, layout_images(spec)
            )
            self._layouts = ClientLayouts(stores, self._source.open_tree, near)
            self._stack.push_async_callback(self._layouts.close)
        self._session = await self._stack.enter_async_context(
            BkSession(self._client, self._shared_key, self._providers(self._outputs))
        )
        if spec.call:
            return await self._ask()
        mounts = self._mounts()
        with self._runtime.building(mounts):
            outcome = await self._solve_and_repair(
                [Attributed(item.type, item.attributes) for item in plan]
            )
            mounts.worked = isinstance(outcome, SolveResult)
        if isinstance(outcome, SolveFailure):
            failure = outcome.to_message()
            await self._rights.explain(failure)
            return failure
        success = Success(exporter_response=self.cache.readable_values(outcome.exporter_response))
        await self._note_image(success)
        await self._note_layouts(success)
        return success

    async def _prefetch(self) -> None:
        """Ask for what will be needed of the client when it may have left."""
        if self._pushes:
            self._credentials.prefetch(self._pushes)
            await self._credentials.prefetched()
            self.needs.end(LOGINS)
        if self._start.spec.secret_ids:
            await self.secrets.wait_complete()
            self.needs.end(SECRETS)

    async def _prepare(self) -> None:
        await self._open_cache()
        spec, native = self._start.spec, self._runtime.native_platform
        base = shared_key_base(self.project_id, spec, native)
        self._stack.push_async_callback(self.release_key)
        alike = likeness(spec, self._start.inline_files, native)
        self._shared_key = await self._key.enter_async_context(
            self._runtime.shared_key(base, alike)
        )
        await self._tell_cache_problem()

    def _providers(self, outputs: Outputs | None) -> SessionProviders:
        """Return what BuildKit finds in a session of the build."""
        return SessionProviders(
            source=self._source,
            credentials=self._credentials,
            secrets=self.secrets,
            agents=self._agents,
            outputs=outputs,
            layouts=self._layouts,
            rules=self.urls,
        )

    async def _solve_and_repair(self, plan: list[Attributed]) -> SolveResult | SolveFailure:
        """Solve; when promised cache content cannot be read, repeat, at last without the cache."""
        reference = self.cache.import_name
        imports = [Attributed("registry", {"ref": reference})] if self.cache.imports else []
        attempts, number = [imports, imports, []] if imports else [[]], 0
        while True:
            last = number + 1 == len(attempts)
            self._steps.begin_attempt()
            self._repeats.begin_attempt(last=last, cache_import=reference if number else "")
            outcome = await self._solve(plan, attempts[number])
            if isinstance(outcome, SolveResult) or not outcome.is_cache_fault:
                return outcome
            if last or (self._outputs and self._outputs.begun):
                return outcome
            kept = await self._note_fault(outcome)
            if number == 0:
                await self.link.notice(
                    "cached content could not be read; its steps are built again"
                )
            # When nothing whole is left to import, BuildKit would only complain about that.
            useless = kept or await self.cache.offer(after_fault=True) is None
            number = len(attempts) - 1 if useless else number + 1

    async def _solve(
        self, plan: list[Attributed], imports: list[Attributed]
    ) -> SolveResult | SolveFailure:
        spec = SolveSpec(
            frontend_attributes={
                **frontend_attributes(self._start.spec),
                **self._rights.attributes,
            },
            entitlements=self._rights.entitlements,
            exporters=plan,
            cache_imports=[*imports, *other_imports(self._start.spec)],
            cache_exports=other_exports(self._start.spec, self.cache.image_name),
            # The gateway keeps the history; BuildKit's own record would cost some 10 ms of
            # synchronous writes at the end of each build. Only there is the provenance.
            internal=not self._start.spec.metadata_provenance,
            proxy_network=self.proxy_network,
            trace=self.trace,
        )
        wish = self._start.spec.metadata_provenance
        async with self._progress.following(self._client, spec.ref):
            outcome = await self._registries.guard(self._client.solve(spec, self._session))
        if not spec.internal and not await note_provenance(
            self._client, spec.ref, outcome, wish, self.cache.readable
        ):
            await self.link.notice("the provenance for the metadata file could not be read")
        return outcome

    async def _ask(self) -> Success | Failure:
        """Ask the frontend instead of building."""
        attributes = frontend_attributes(self._start.spec)
        spec = SolveSpec(frontend_attributes=attributes, internal=True, trace=self.trace)
        async with self._progress.following(self._client, spec.ref):
            answer = await self._registries.guard(self._client.ask(spec, self._session))
        if isinstance(answer, SolveFailure):
            return answer.to_message()
        return Success(call_result=answer)

    async def _note_image(self, success: Success) -> None:
        for exported in self.cache.written():
            if exported.repository == IMAGE and exported.reference == "result":
                success.image.CopyFrom(await self._admit(exported.digest))
                self.image_digest = exported.digest
                self.image.publication = exported.publication
                self._runtime.images.add(self.member, exported.digest)
                self._stack.callback(self._runtime.images.remove, self.member, exported.digest)

    async def _note_layouts(self, success: Success) -> None:
        """Let the client read the caches that belong into its directories."""
        for exported in self.cache.written():
            index = local_export_index(exported.reference)
            if exported.repository == IMAGE and index is not None:
                manifest = await self._admit(exported.digest)
                success.cache_layouts.add(export_index=index, manifest=manifest)

    async def _admit(self, digest: str) -> ImageDescriptor:
        """Let the client read what a manifest names."""
        media_type = await self.image.admit(digest)
        return ImageDescriptor(
            digest=digest, media_type=media_type, size_bytes=self.image.size(digest)
        )

    def will_publish(self) -> bool:
        """Say whether this build has records that others lack, and set the state of its cache."""
        if self._start.spec.call:
            self.cache.state = CacheState.CACHE_STATE_SKIPPED
            return False
        wanted = self.cache.plan_export(all_cached=self._all_cached)
        if wanted:
            self._runtime.exporting(self._shared_key, self.hurry)
        return wanted

    async def export_cache(self) -> list[int] | None:
        """Export the cache of a build that worked into the node's registry.

        A second solve, for which everything is cached, so it only writes layers; the user does
        not wait for it. It has a session of its own: within one session BuildKit finds the steps
        by keys of that session, which are good for nothing in an exported cache.
        """
        target = {"ref": self.cache.export_name, **EXPORT_ATTRIBUTES}
        spec = SolveSpec(
            frontend_attributes={
                **frontend_attributes(self._commits.pinned(), use_cache=False),
                **self._rights.attributes,
            },
            entitlements=self._rights.entitlements,
            cache_exports=[Attributed("registry", target)],
            internal=True,
            proxy_network=self.proxy_network,
            trace=self.trace,
        )
        if self._source is None:
            raise NodeLostError("the build has not begun")
        self._source.on_replayed = self.release_key
        try:
            async with (
                asyncio.timeout(EXPORT_SECONDS),
                BkSession(self._client, self._shared_key, self._providers(None)) as session,
            ):
                outcome = await self._client.solve(spec, session)
        except (OffloadError, TimeoutError) as error:
            outcome = SolveFailure(message=str(error) or type(error).__name__)
        if isinstance(outcome, SolveResult):
            publications = self.cache.exported()
            if publications is not None:
                return publications
        reason = outcome.message if isinstance(outcome, SolveFailure) else "nothing was pushed"
        log.warning(
            "cache.export.failed", build_id=self.build_id, reason=self.cache.readable(reason)
        )
        self.cache.export_failed()
        return None

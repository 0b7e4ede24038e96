"""One build at the node: from a redeemed ticket to a result, and what it adds to the cache."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from offload_builder.buildkit.failure import SolveFailure
from offload_builder.buildkit.providers import SessionProviders
from offload_builder.buildkit.session import BkSession
from offload_builder.buildkit.solve import Attributed, SolveResult, SolveSpec
from offload_builder.node.buildprogress import BuildProgress
from offload_builder.node.cacheplan import (
    cache_stores,
    local_export_index,
    other_exports,
    other_imports,
)
from offload_builder.node.content import BuildContent
from offload_builder.node.contextplan import layout_images, layout_stores
from offload_builder.node.faults import storage_error
from offload_builder.node.gitcommits import GitCommits
from offload_builder.node.imagefiles import ImageFiles
from offload_builder.node.localsource import BuildContext
from offload_builder.node.logins import BuildLogins
from offload_builder.node.mounts.usage import BuildMounts
from offload_builder.node.nearimages import NearImages
from offload_builder.node.needs import LOGINS, SECRETS, ClientNeeds, ContextWatch, lasting_needs
from offload_builder.node.ocilayout import ClientLayouts
from offload_builder.node.outcomes import error_of, failure_of
from offload_builder.node.outputs import Outputs
from offload_builder.node.provenance import note_provenance
from offload_builder.node.pushtargets import push_targets
from offload_builder.node.registrytrouble import explain_failure
from offload_builder.node.registrywatch import RegistryWatch
from offload_builder.node.repeats import RepeatFilter
from offload_builder.node.secretstore import BuildSecrets
from offload_builder.node.solveplan import (
    EXPORT_ATTRIBUTES,
    NameRewriter,
    cache_entry_key,
    check_spec,
    exporters,
    frontend_attributes,
    likeness,
    shared_key_base,
)
from offload_builder.node.sshagents import ClientAgents
from offload_builder.node.steps import StepTally
from offload_builder.node.why.record import BuildRecord
from offload_cache.contributions import Writer
from offload_cache.registry.grants import EXPORT_TAG, IMAGE, IMPORT_TAG, Grant
from offload_core.aio import TaskSet, finish
from offload_core.errors import NodeLostError, OffloadError, find_offload_error
from offload_proto.v1.build_spec_pb2 import ImageDescriptor
from offload_proto.v1.builds_service_pb2 import BuildState, BuildStats, CacheState
from offload_proto.v1.node_service_pb2 import Failure, Result, Success

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.departure import ClientSeat
    from offload_builder.node.journal import Journal
    from offload_builder.node.project import ProjectRuntime
    from offload_builder.node.steprights import StepRights
    from offload_cache.offers import Offer
    from offload_cache.registry.grants import Registry
    from offload_proto.v1.builds_service_pb2 import Ticket
    from offload_proto.v1.node_service_pb2 import RunResponse, Start
    from offload_proto.v1.nodes_service_pb2 import StepTime

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 10.0
PUBLISH_SECONDS = 600.0
EXPORT_SECONDS = 1800.0


class BuildJob:
    """Runs one build: `run` once, then perhaps `export_cache`, and `close` at the end.

    Attributes:
        log_sent: the gateway has the log, or will not get it.
        publishing: set while no cache export needs what the job holds.
    """

    def __init__(
        self,
        ticket: Ticket,
        start: Start,
        runtime: ProjectRuntime,
        registry: Registry,
        registry_address: str,
        link: ClientLink,
        journal: Journal,
        rights: StepRights,
    ) -> None:
        self.build_id = ticket.build_id
        self.member = ticket.member
        self.project_id = ticket.project_id
        self.link = link
        self.journal = journal
        self.stats = BuildStats()
        self.image = ImageFiles(runtime.cache.store)
        self.image_digest = ""
        self.cache_state: CacheState.ValueType = CacheState.CACHE_STATE_UNSPECIFIED
        self.content = BuildContent(
            runtime.context_store, runtime.arrivals, link, runtime.shared_context, self.stats
        )
        self._ticket = ticket
        self._start = start
        self._runtime = runtime
        self._registry = registry
        self._registry_address = registry_address
        self._stack = AsyncExitStack()
        self._key = AsyncExitStack()
        self._steps = StepTally()
        self._repeats = RepeatFilter()
        self._record = BuildRecord(ticket, start)
        self._rights = rights
        self._secrets = BuildSecrets(link, start.spec.secret_ids)
        self._commits = GitCommits(start.spec)
        self._agents = ClientAgents(link, start.spec.ssh_ids) if start.spec.ssh_ids else None
        self.pool_logins = runtime.pool_logins
        self._credentials = BuildLogins(link, self.pool_logins)
        self._stack.push_async_callback(self._credentials.close)
        self._pushes = push_targets(start.spec)
        self._registries = RegistryWatch(
            link, runtime.pool_logins, [host for host, _ in self._pushes]
        )
        self._stack.push_async_callback(self._registries.close)
        self._client: BuildkitClient
        self._session: BkSession
        self._source: BuildContext | None = None
        self._layouts: ClientLayouts | None = None
        self._outputs: Outputs | None = None
        self._capability = ""
        self._rewrite: NameRewriter
        self._has_own_key = False
        self._imports = False
        self.needs = ClientNeeds()
        self.seat: ClientSeat
        """Of its client; set by the agent."""
        self._watch = ContextWatch(self.needs, start.spec)
        for need in lasting_needs(start.spec):
            self.needs.begin(need)
        if self._pushes:
            self.needs.begin(LOGINS)
        if start.spec.secret_ids:
            self.needs.begin(SECRETS)
        self._progress = BuildProgress(
            journal,
            link,
            (self._steps.add, self._registries.see, self._repeats.apply, self._watch.take),
            self._clean,
            (self._record.add, self._commits.see),
        )
        self.result: Result | None = None
        self.over = asyncio.Event()
        """Set when there is a result."""
        self.ending: tuple[BuildState.ValueType, str] | None = None
        """State and error, once it has ended."""
        self.log_sent = asyncio.Event()
        self.publishing = asyncio.Event()
        self.publishing.set()
        self.hurry = asyncio.Event()
        """Set when the next build waits for what this one's export holds."""
        self._shared_key = ""
        self._entry_key = ""
        self.open_uploads = 0
        """Upload streams of the client, bounded by the service."""

    async def run(self) -> Result:
        """Build; the result says also what went wrong.

        Cancelling this cancels the build in BuildKit.
        """
        outcome: Success | Failure = Failure(kind=Failure.KIND_NODE, message="the node failed")
        try:
            outcome = await self._run()
        except asyncio.CancelledError:
            outcome = Failure(kind=Failure.KIND_CANCELED, message="the build was cancelled")
            raise
        except OffloadError as error:
            outcome = failure_of(error)
        except (OSError, sqlite3.Error) as error:
            log.error("build.storage.failed", build_id=self.build_id, exc_info=error)
            outcome = failure_of(storage_error("run the build", error))
        except BaseExceptionGroup as group:
            known = find_offload_error(group)
            if known is None:
                raise
            outcome = failure_of(known)
        finally:
            self._secrets.forget_steps()
            if isinstance(outcome, Failure):
                outcome.message = self._clean(outcome.message)
                explain_failure(outcome, self._credentials, self._runtime.base_images)
            if self._outputs is not None:
                self._outputs.settle(error_of(outcome))
            if self._source is not None:
                self._record.read(self._source.told())
            self.stats.steps_total = self._steps.total
            self.stats.steps_cached = self._steps.cached
            self.stats.warnings = self._progress.warnings
        if isinstance(outcome, Failure):
            return Result(failure=outcome, stats=self.stats)
        return Result(success=outcome, stats=self.stats)

    async def _run(self) -> Success | Failure:
        spec = self._start.spec
        check_spec(spec)
        self._stack.push_async_callback(self._secrets.close)
        self._secrets.fetch()
        prefetching = TaskSet()
        self._stack.push_async_callback(prefetching.close)
        prefetching.start(self._prefetch(), name=f"prefetch.{self.build_id}")
        await self._prepare()
        if spec.save_image and self._runtime.uploads is None:
            await self.link.notice(
                "this pool has no shared store: the image is kept at its node for a while only"
            )
        plan = exporters(spec, f"{self._registry_address}/{self._capability}/image")
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
        if stores := layout_stores(spec) | cache_stores(spec):
            near = NearImages(
                self._runtime.images, self.member, self._runtime.cache.store, layout_images(spec)
            )
            self._layouts = ClientLayouts(stores, self._source.open_tree, near)
            self._stack.push_async_callback(self._layouts.close)
        self._session = await self._stack.enter_async_context(
            BkSession(
                self._client,
                self._shared_key,
                SessionProviders(
                    source=self._source,
                    credentials=self._credentials,
                    secrets=self._secrets,
                    agents=self._agents,
                    outputs=self._outputs,
                    layouts=self._layouts,
                ),
            )
        )
        mounts = BuildMounts(
            read_scopes=tuple(self._ticket.read_scopes),
            write_scope=self._ticket.write_scope,
            build_id=self.build_id,
            tell=self.link.notice,
        )
        if spec.call:
            return await self._ask()
        with self._runtime.building(mounts):
            outcome = await self._solve_and_repair(
                [Attributed(item.type, item.attributes) for item in plan]
            )
            mounts.worked = isinstance(outcome, SolveResult)
        if isinstance(outcome, SolveFailure):
            failure = outcome.to_message()
            await self._rights.explain(failure)
            return failure
        success = Success(exporter_response=self._rewrite.response(outcome.exporter_response))
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
            await self._secrets.wait_complete()
            self.needs.end(SECRETS)

    async def _prepare(self) -> None:
        spec, ticket = self._start.spec, self._ticket
        if spec.pull and self._runtime.base_images is not None:
            self._runtime.base_images.recheck()
        native = self._runtime.native_platform
        self._entry_key = self._record.key = cache_entry_key(spec, native)
        self._capability = self._registry.grant(
            Grant(
                cache=self._runtime.cache,
                read_scopes=tuple(ticket.read_scopes),
                write_scope=ticket.write_scope or None,
                entry_key=self._entry_key,
                writer=Writer(
                    build_id=ticket.build_id,
                    member=ticket.member,
                    role=ticket.role,
                    node_id=ticket.node_id,
                    branch=ticket.vcs_branch,
                    revision=ticket.vcs_revision,
                ),
                may_import=not spec.no_cache,
                results=self._runtime.own_results,
            )
        )
        self._stack.push_async_callback(self._registry.revoke, self._capability)
        self._rewrite = NameRewriter(self._registry_address, self._capability)
        self._progress.secret = self._capability
        # What is known is enough for now: BuildKit asks later, and hears the news.
        offering = asyncio.ensure_future(self._offer(patient=False))
        try:
            self._client = await self._stack.enter_async_context(self._runtime.use())
            offer = await offering
        finally:
            offering.cancel()
        self._record.offered(offer)
        self._imports = offer is not None and self._needs(offer)
        if spec.cache_imports:
            self._runtime.own_results.imported()
        self._has_own_key = offer is not None and offer.own_key
        if self._has_own_key and not self._imports and not spec.no_cache:
            self._runtime.cache.scopes.note_use(tuple(ticket.read_scopes), self._entry_key)
        base = shared_key_base(ticket.project_id, spec, native)
        self._stack.push_async_callback(self.release_key)
        alike = likeness(spec, self._start.inline_files, native)
        self._shared_key = await self._key.enter_async_context(
            self._runtime.shared_key(base, alike)
        )
        if problem := self._runtime.cache_problem():
            await self.link.notice(
                f"the shared cache is not reachable ({problem}); the build goes on without it"
            )

    def _needs(self, offer: Offer) -> bool:
        if self._start.spec.no_cache:
            return False
        cache, results = self._runtime.cache, self._runtime.own_results
        known = results.hold_all(offer.contributions)
        return not known or cache.offers.awaits_news(self._ticket.read_scopes)

    async def _offer(self, *, after_fault: bool = False, patient: bool = True) -> Offer | None:
        """Return what can be imported; whatever goes wrong with the cache is a miss."""
        offers, scopes = self._runtime.cache.offers, tuple(self._ticket.read_scopes)
        wish = {"after_fault": after_fault, "patient": patient}
        try:
            return await offers.offer(scopes, self._entry_key, **wish)
        except Exception as error:
            log.error("cache.offer.failed", build_id=self.build_id, exc_info=error)
            return None

    async def _solve_and_repair(self, plan: list[Attributed]) -> SolveResult | SolveFailure:
        """Solve; when promised cache content cannot be read, repeat, at last without the cache."""
        reference = f"{self._registry_address}/{self._capability}/cache:{IMPORT_TAG}"
        imports = [Attributed("registry", {"ref": reference})] if self._imports else []
        attempts = [imports, imports, []] if imports else [[]]
        number = 0
        while True:
            last = number + 1 == len(attempts)
            self._steps.begin_attempt()
            self._repeats.begin_attempt(last=last, cache_import=reference if number else "")
            outcome = await self._solve(plan, attempts[number])
            if isinstance(outcome, SolveResult) or not outcome.is_cache_fault:
                return outcome
            if last or (self._outputs and self._outputs.begun):
                return outcome
            log.warning(
                "cache.import.failed", build_id=self.build_id, reason=self._clean(outcome.message)
            )
            self._record.faults += 1
            # The damaged content stays as long as other builds need BuildKit's downloads.
            kept = outcome.is_digest_mismatch and not await self._runtime.wipe_ingest()
            if number == 0:
                await self.link.notice(
                    "cached content could not be read; its steps are built again"
                )
            # When nothing whole is left to import, BuildKit would only complain about that.
            useless = kept or await self._offer(after_fault=True) is None
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
            cache_exports=other_exports(
                self._start.spec, f"{self._registry_address}/{self._capability}/{IMAGE}"
            ),
            # The gateway keeps the history; BuildKit's own record would cost some 10 ms of
            # synchronous writes at the end of each build. Only there is the provenance.
            internal=not self._start.spec.metadata_provenance,
        )
        async with self._progress.following(self._client, spec.ref):
            outcome = await self._registries.guard(self._client.solve(spec, self._session))
        if not spec.internal and not await note_provenance(
            self._client, spec.ref, outcome, self._start.spec.metadata_provenance, self._clean
        ):
            await self.link.notice("the provenance for the metadata file could not be read")
        return outcome

    async def _ask(self) -> Success | Failure:
        """Ask the frontend instead of building."""
        spec = SolveSpec(frontend_attributes=frontend_attributes(self._start.spec), internal=True)
        async with self._progress.following(self._client, spec.ref):
            answer = await self._registries.guard(self._client.ask(spec, self._session))
        if isinstance(answer, SolveFailure):
            return answer.to_message()
        return Success(call_result=answer)

    def _clean(self, text: str) -> str:
        return self._rewrite(text) if self._capability else text

    async def _note_image(self, success: Success) -> None:
        for exported in self._registry.exports(self._capability):
            if exported.repository == IMAGE and exported.reference == "result":
                success.image.CopyFrom(await self._admit(exported.digest))
                self.image_digest = exported.digest
                self.image.publication = exported.publication
                self._runtime.images.add(self.member, exported.digest)
                self._stack.callback(self._runtime.images.remove, self.member, exported.digest)

    async def _note_layouts(self, success: Success) -> None:
        """Let the client read the caches that belong into its directories."""
        for exported in self._registry.exports(self._capability):
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

    @property
    def image_saved(self) -> bool:
        """Whether the shared store keeps the image beyond the time of this node."""
        wanted = self._start.spec.save_image and bool(self.image_digest)
        return wanted and self._runtime.uploads is not None

    def repeated(self) -> list[RunResponse]:
        """Return what a client that comes back is asked and told again."""
        messages = self.link.repeated(context=self.needs.needs_context())
        messages += self.content.blobs.repeated()
        if self._outputs is not None:
            messages += self._outputs.repeated()
        return messages

    def conclude(self, result: Result) -> None:
        """Note how it ended; nothing is needed of the client any more. The first word holds."""
        if self.result is None:
            self.result = result
            self.seat.close()
            self.journal.finish()
            self.over.set()

    def step_times(self) -> list[StepTime]:
        """Return how long the steps took; empty before the end."""
        return self._steps.times(self._entry_key) if self.ending is not None else []

    async def save_record(self) -> None:
        """Keep what explains later which steps ran, and why; a call runs none."""
        if self._start.spec.call:
            return
        await self._record.save(self._runtime.traces)

    def will_publish(self) -> bool:
        """Say whether this build has records that others lack, and set `cache_state`."""
        if self._start.spec.call:
            self.cache_state = CacheState.CACHE_STATE_SKIPPED
            return False
        scope, key, ledger = self._ticket.write_scope, self._entry_key, self._runtime.exports
        all_cached = self._steps.total == self._steps.cached
        if not all_cached:
            ledger.ran(key)
        if not scope:
            self.cache_state = CacheState.CACHE_STATE_SKIPPED
        elif self._has_own_key and all_cached and ledger.is_exported(scope, key):
            self.cache_state = CacheState.CACHE_STATE_UNCHANGED
        else:
            self.cache_state = CacheState.CACHE_STATE_PENDING
            ledger.begin(scope, key)
            self._runtime.exporting(self._shared_key, self.hurry)
        return self.cache_state == CacheState.CACHE_STATE_PENDING

    async def release_key(self) -> None:
        """Let the next build have BuildKit's copy of the local sources; safe to call again."""
        await self._key.aclose()

    async def export_cache(self) -> list[int] | None:
        """Export the cache of a build that worked into the node's registry.

        A second solve, for which everything is cached, so it only writes layers; the user does
        not wait for it. It has a session of its own: within one session BuildKit finds the steps
        by keys of that session, which are good for nothing in an exported cache.

        Returns:
            Publications to wait for with `confirm_published`; None when it did not work.
        """
        reference = f"{self._registry_address}/{self._capability}/cache:{EXPORT_TAG}"
        spec = SolveSpec(
            frontend_attributes={
                **frontend_attributes(self._commits.pinned(), use_cache=False),
                **self._rights.attributes,
            },
            entitlements=self._rights.entitlements,
            cache_exports=[Attributed("registry", {"ref": reference, **EXPORT_ATTRIBUTES})],
            internal=True,
        )
        source = self._source
        if source is None:
            raise NodeLostError("the build has not begun")
        source.on_replayed = self.release_key
        try:
            async with (
                asyncio.timeout(EXPORT_SECONDS),
                BkSession(
                    self._client,
                    self._shared_key,
                    SessionProviders(
                        source=source,
                        credentials=self._credentials,
                        secrets=self._secrets,
                        agents=self._agents,
                        layouts=self._layouts,
                    ),
                ) as session,
            ):
                outcome = await self._client.solve(spec, session)
        except (OffloadError, TimeoutError) as error:
            outcome = SolveFailure(message=str(error) or type(error).__name__)
        exports = self._registry.exports(self._capability)
        if isinstance(outcome, SolveResult) and any(
            item.reference == EXPORT_TAG for item in exports
        ):
            for item in exports:
                if item.contribution:
                    self._runtime.own_results.add(item.contribution)
            self._runtime.exports.done(self._ticket.write_scope, self._entry_key)
            return [item.publication for item in exports if item.publication is not None]
        self._runtime.exports.failed(self._ticket.write_scope, self._entry_key)
        reason = outcome.message if isinstance(outcome, SolveFailure) else "nothing was pushed"
        log.warning("cache.export.failed", build_id=self.build_id, reason=self._clean(reason))
        self.cache_state = CacheState.CACHE_STATE_FAILED
        return None

    async def confirm_published(self, publications: list[int]) -> None:
        """Wait until every other node can read what was exported; needs nothing that is held."""
        uploads = self._runtime.uploads
        if uploads is not None:
            for number in publications:
                if not await uploads.wait_published(number, PUBLISH_SECONDS):
                    if not await uploads.is_pending(number):
                        # It was given up: the next build pushes what turned out to be missing.
                        self._runtime.exports.failed(self._ticket.write_scope, self._entry_key)
                    self.cache_state = CacheState.CACHE_STATE_FAILED
                    return
        self.cache_state = CacheState.CACHE_STATE_PUBLISHED

    def read_output(self, index: int) -> AsyncGenerator[bytes]:
        """Return the stream of an exporter."""
        if self._outputs is None:
            raise NodeLostError("the build has not begun")
        return self._outputs.read(index)

    def lose(self, error: OffloadError) -> None:
        """End everything that waits for the client, now and later; the first error holds."""
        self.link.lose(error)
        self.content.lose(error)

    async def close(self) -> None:
        """Release everything; runs to its end also while being cancelled."""
        if self._outputs is not None:
            self._outputs.stop()
        try:
            await finish(self._stack.aclose(), CLOSE_SECONDS)
        finally:
            await finish(self.content.close(), CLOSE_SECONDS)

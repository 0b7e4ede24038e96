"""One build at the node, as the agent knows it: from a redeemed ticket to a result."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from offload_builder.egress.urls.buildurls import urls_of
from offload_builder.node.buildcache import BuildCache
from offload_builder.node.buildprogress import BuildProgress
from offload_builder.node.content import BuildContent
from offload_builder.node.egressreport import BuildEgress
from offload_builder.node.faults import storage_error
from offload_builder.node.gitcommits import GitCommits
from offload_builder.node.imagefiles import ImageFiles
from offload_builder.node.logins import BuildLogins
from offload_builder.node.mounts.usage import BuildMounts
from offload_builder.node.needs import LOGINS, SECRETS, ClientNeeds, ContextWatch, lasting_needs
from offload_builder.node.outcomes import error_of, failure_of
from offload_builder.node.pushtargets import push_targets
from offload_builder.node.registrytrouble import explain_failure
from offload_builder.node.registrywatch import RegistryWatch
from offload_builder.node.repeats import RepeatFilter
from offload_builder.node.secretstore import BuildSecrets
from offload_builder.node.steps import StepTally
from offload_builder.node.why.record import BuildRecord
from offload_core.aio import finish
from offload_core.errors import (
    InvalidValueError,
    NodeLostError,
    OffloadError,
    find_offload_error,
)
from offload_core.reference import normalise_reference
from offload_proto.v1.builds_service_pb2 import BuildState, BuildStats
from offload_proto.v1.node_service_pb2 import Failure, Result, Success

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.buildkit.failure import SolveFailure
    from offload_builder.node.clientlink import ClientLink
    from offload_builder.node.departure import ClientSeat
    from offload_builder.node.journal import Journal
    from offload_builder.node.outputs import Outputs
    from offload_builder.node.project import ProjectRuntime
    from offload_builder.node.steprights import StepRights
    from offload_cache.registry.grants import Registry
    from offload_proto.v1.builds_service_pb2 import Ticket
    from offload_proto.v1.events_pb2 import ProgressBatch
    from offload_proto.v1.node_service_pb2 import RunResponse, Start
    from offload_proto.v1.nodes_service_pb2 import StepTime

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 10.0


class BuildJob(ABC):
    """One build: `run` once, then perhaps `export_cache`, and `close` at the end.

    Here is what the agent needs of every build; each kind of client has a kind of build that says
    how it is solved and how its cache is exported.

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
        self.network_policy = (
            ticket.network_policy.SerializeToString() if ticket.HasField("network_policy") else b""
        )
        self.link = link
        self.journal = journal
        self.stats = BuildStats()
        self.image = ImageFiles(runtime.cache.store)
        self.image_digest = ""
        self.cache = BuildCache(ticket, start.spec, runtime, registry, registry_address)
        self.content = BuildContent(
            runtime.context_store, runtime.arrivals, link, runtime.shared_context, self.stats
        )
        self._ticket = ticket
        self._start = start
        self._runtime = runtime
        self._stack = AsyncExitStack()
        self._key = AsyncExitStack()
        self._steps = StepTally()
        self._repeats = RepeatFilter()
        self._record = BuildRecord(ticket, start)
        self._rights = rights
        self.secrets = BuildSecrets(link, start.spec.secret_ids)
        self._commits = GitCommits(start.spec)
        self.pool_logins = runtime.pool_logins
        self._credentials = BuildLogins(link, self.pool_logins)
        self._stack.push_async_callback(self._credentials.close)
        self._pushes = push_targets(start.spec)
        self._registries = RegistryWatch(
            link, runtime.pool_logins, [host for host, _ in self._pushes]
        )
        self._stack.push_async_callback(self._registries.close)
        self.urls = urls_of(self.build_id, lambda: runtime.urls, link, self._stack)
        self.egress = BuildEgress(self.build_id, self._say)
        self.proxy_network = self.urls is not None and self.urls.proxied
        self._client: BuildkitClient
        self._outputs: Outputs | None = None
        """What the client fetches of the node; None when BuildKit sends it itself."""
        self.trace = ""
        """Of its calls to BuildKit; names its control group, where it has one."""
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
            self.cache.readable,
            (
                self._record.add,
                self._commits.see,
                self.egress.see,
                *([self.urls.see] if self.urls else []),
            ),
        )
        self.result: Result | None = None
        self.over = asyncio.Event()
        """Set when there is a result."""
        self.ending: tuple[BuildState.ValueType, str] | None = None
        """State and error, once it has ended."""
        self.log_sent, self.publishing = asyncio.Event(), asyncio.Event()
        self.publishing.set()
        self.hurry = asyncio.Event()
        """Set when the next build waits for what this one's export holds."""
        self.open_uploads = 0
        """Upload streams of the client, bounded by the service."""

    async def run(self) -> Result:
        """Build; the result says also what went wrong.

        Cancelling this cancels the build in BuildKit.
        """
        outcome: Success | Failure = Failure(kind=Failure.KIND_NODE, message="the node failed")
        try:
            outcome = await self._run()
            if isinstance(outcome, Failure):
                await self._name_refusals(outcome)
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
            self.secrets.forget_steps()
            self.egress.finish(self.urls.record if self.urls is not None else None)
            if isinstance(outcome, Failure):
                outcome.message = self.cache.readable(outcome.message)
                explain_failure(outcome, self._credentials, self._runtime.base_images)
            if self._outputs is not None:
                self._outputs.settle(error_of(outcome))
            self.stats.steps_total = self._steps.total
            self.stats.steps_cached = self._steps.cached
            self.stats.warnings = self._progress.warnings
        if isinstance(outcome, Failure):
            return Result(failure=outcome, stats=self.stats)
        return Result(success=outcome, stats=self.stats)

    @abstractmethod
    async def _run(self) -> Success | Failure:
        """Build, and return how it ended, but for what the node itself could not do."""

    def _say(self, news: ProgressBatch) -> None:
        """Put news of our own into the progress of the build."""
        self._progress.say(news)

    async def egress_settled(self) -> None:
        """Wait until it is known what a step that failed was refused; none failed, no wait."""
        if self.egress.any_failed:
            await self._runtime.reported()

    async def _name_refusals(self, failure: Failure) -> None:
        if failure.kind != Failure.KIND_BUILD:
            return
        await self.egress_settled()
        if lines := self.egress.sentences(failure.vertex):
            failure.message = "\n".join((failure.message, *lines))

    async def _open_cache(self) -> None:
        """Open the pool's cache for the build, and its project's BuildKit."""
        if self._start.spec.pull and self._runtime.base_images is not None:
            self._runtime.base_images.recheck()
        self.cache.open()
        self._stack.push_async_callback(self.cache.close)
        self._record.key = self.cache.entry_key
        self._progress.secret = self.cache.capability
        # What is known is enough for now: BuildKit asks later, and hears the news.
        offering = asyncio.ensure_future(self.cache.offer(patient=False))
        try:
            self._client = await self._stack.enter_async_context(self._runtime.use())
            self._stack.enter_context(self._runtime.reporting(self.egress))
            self.trace = self._stack.enter_context(self._runtime.groups.building(self.build_id))
            offer = await offering
        finally:
            offering.cancel()
        self._record.offered(offer)
        self.cache.take(offer)

    async def _tell_cache_problem(self) -> None:
        """Tell the client when the build has to do without the pool's cache."""
        if problem := self._runtime.cache_problem():
            await self.link.notice(
                f"the shared cache is not reachable ({problem}); the build goes on without it"
            )

    async def _note_fault(self, failure: SolveFailure) -> bool:
        """Note that promised cache content could not be read; return whether the damage stays.

        It stays as long as other builds need BuildKit's downloads.
        """
        log.warning(
            "cache.import.failed",
            build_id=self.build_id,
            reason=self.cache.readable(failure.message),
        )
        self._record.faults += 1
        return failure.is_digest_mismatch and not await self._runtime.wipe_ingest()

    def _mounts(self) -> BuildMounts:
        """Return what the build may do with the project's cache mounts."""
        return BuildMounts(
            read_scopes=tuple(self._ticket.read_scopes),
            write_scope=self._ticket.write_scope,
            build_id=self.build_id,
            tell=self.link.notice,
        )

    @property
    def image_saved(self) -> bool:
        """Whether the shared store keeps the image beyond the time of this node."""
        wanted = self._start.spec.save_image and bool(self.image_digest)
        return wanted and self._runtime.uploads is not None

    @property
    def image_names(self) -> list[str]:
        """The names of its image, normalised."""
        found: list[str] = []
        for tag in self._start.spec.tags:
            # Whoever wants the image under it says what is wrong with it.
            with contextlib.suppress(InvalidValueError):
                found.append(normalise_reference(tag))
        return found

    def repeated(self) -> list[RunResponse]:
        """Return what a client that comes back is asked and told again."""
        messages = self.link.repeated(context=self.needs.needs_context())
        messages += self.content.blobs.repeated()
        if self._outputs is not None:
            messages += self._outputs.repeated()
        return messages

    async def linger(self) -> None:  # noqa: B027 - most kinds need not wait
        """Wait, after `run`, until its end may be written down."""

    def conclude(self, result: Result) -> None:
        """Note how it ended; nothing is needed of the client any more. The first word holds."""
        if self.result is None:
            self.result = result
            self.seat.close()
            self.journal.finish()
            self.over.set()

    def step_times(self) -> list[StepTime]:
        """Return how long the steps took; empty before the end."""
        return self._steps.times(self.cache.entry_key) if self.ending is not None else []

    async def save_record(self) -> None:
        """Keep what explains later which steps ran, and why; a call runs none."""
        if self._start.spec.call:
            return
        await self._record.save(self._runtime.traces)

    @property
    def _all_cached(self) -> bool:
        return self._steps.total == self._steps.cached

    @abstractmethod
    def will_publish(self) -> bool:
        """Say whether this build has records that others lack, and set the state of its cache."""

    @abstractmethod
    async def export_cache(self) -> list[int] | None:
        """Export what a build that worked adds to the cache.

        Returns:
            Publications to wait for with `cache.confirm_published`; None when it did not work.
        """

    async def release_key(self) -> None:
        """Let the next build have BuildKit's copy of the local sources; safe to call again."""
        await self._key.aclose()

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

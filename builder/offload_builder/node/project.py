"""What a node runs per project and trust domain: a BuildKit of its own, cache, context files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import structlog

from offload_builder.buildkit.daemon import BuildkitDaemon
from offload_builder.buildkit.daemon_config import DaemonSettings
from offload_builder.egress.firewall.daemonnet import leases_folder
from offload_builder.node.buildgroups import BuildGroups
from offload_builder.node.buildlimits import BuildLimits
from offload_builder.node.devicesurvey import device_folders
from offload_builder.node.diskwatch import DiskNotes, Watched
from offload_builder.node.exportledger import ExportLedger
from offload_builder.node.mounts.gate import StepGate
from offload_builder.node.mounts.service import CacheMounts, open_cache_mounts
from offload_builder.node.nearimages import HeldImages
from offload_builder.node.ownresults import OwnResults
from offload_builder.node.stepdisk import StepDisk
from offload_builder.node.steplimits import StepBounds
from offload_builder.node.steprights import StepPolicy
from offload_builder.node.stickytimes import StickyTimes
from offload_builder.provider.process import tools_directory
from offload_core.errors import NodeLostError, OffloadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path
    from types import TracebackType

    from offload_builder.buildkit.client import BuildkitClient
    from offload_builder.egress.urls.urlpolicy import UrlPolicy
    from offload_builder.node.config import NodeConfig
    from offload_builder.node.egressreport import BuildEgress
    from offload_builder.node.mounts.usage import BuildMounts
    from offload_builder.node.place import Place
    from offload_builder.node.projectcontent import ProjectContent
    from offload_builder.node.registries import Bases
    from offload_builder.node.trustdomain import TrustDomain
    from offload_cache.nodestore import NodeStore, ProjectCache
    from offload_cache.uploads import UploadQueue

log = structlog.get_logger(__name__)

EXPORT_WAIT_SECONDS = 1.0
MAX_ALIKE = 256


@dataclass(frozen=True, slots=True)
class _ExportKey:
    """A key of the local sources that an export still needs."""

    hurry: asyncio.Event
    released: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a project gets of its node.

    Attributes:
        node_store: the node's cache.
        bases: the way of its BuildKit to registries and base images.
        place: of its BuildKit in the network.
        packing: held while cache mounts are packed.
    """

    node_store: NodeStore
    bases: Bases
    place: Place
    packing: asyncio.Semaphore


class ProjectRuntime:
    """A trust domain of a project; its BuildKit runs from the first build until it is idle."""

    def __init__(
        self,
        domain: TrustDomain,
        cache: ProjectCache,
        content: ProjectContent,
        config: NodeConfig,
        surroundings: Surroundings,
    ) -> None:
        folder = domain.folder(config)
        bases = surroundings.bases
        self.place = surroundings.place
        self.registry_address = surroundings.place.registry_address
        self.domain = domain
        self.project_id = domain.project_id
        self.cache = cache
        self.base_images = bases.images
        self.pool_logins = bases.logins
        self.native_platform = config.native_platforms()[0]
        self.context_store = content.store
        self.arrivals = content.arrivals
        self.traces = content.traces
        self.why = content.why
        self.shared_context = content.shared
        self.times: StickyTimes
        self._times_path = folder / "times.db"
        self._node_store = surroundings.node_store
        self._idle_stop_seconds = domain.buildkit_idle(config)
        self._users = 0
        self._idle_since = time.monotonic()
        self._keys_in_use: dict[str, _ExportKey | None] = {}
        self._alike: dict[str, str] = {}
        self._wipe_due = False
        self.exports = ExportLedger(folder / "exports.json")
        self.mounts: CacheMounts | None = open_cache_mounts(
            cache.store, folder / "mounts", config, surroundings.packing
        )
        self._gate: StepGate | None = None
        if (desk := surroundings.place.desk) is not None:
            desk.sources.leases = self._leases
            if self.mounts is not None:
                self.mounts.watch(desk.sources.begin)
            else:
                self._gate = StepGate((folder / "gate").absolute(), desk.sources.begin)
        gate = self.mounts or self._gate
        self.images = HeldImages()
        self.own_results = OwnResults(folder / "buildkit")
        limits = BuildLimits.of(config, domain.project_id)
        self.groups = BuildGroups(folder / "buildkit", limits)
        ended_for_disk = DiskNotes()
        self.policy = StepPolicy.of(
            config, domain.project_id, folder / "buildkit", self.groups, ended_for_disk
        )
        settings = DaemonSettings(
            root=folder / "buildkit",
            entitlements=self.policy.permitted.rights,
            cdi_spec_dirs=device_folders(config, domain, self.policy.permitted),
            binary=config.buildkitd,
            gate=StepBounds.of(config).shell()
            + self.groups.shell
            + (gate.shell if gate is not None else ""),
            apparmor_profile=config.apparmor_profile,
            registries=bases.registries,
            withheld=bases.withheld,
            search=(tools_directory(),),
            gc_max_used_bytes=domain.buildkit_keep(config),
            step_log_max_bytes=config.step_log_max,
        )
        self._daemon = BuildkitDaemon(surroundings.place.settings(settings))
        self.watched = Watched(
            StepDisk(folder / "buildkit", lambda: self._daemon.pid, self.groups),
            limits.disk_bytes,
            ended_for_disk,
            lambda: self.busy,
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open what the project has on disk.

        Raises:
            QuotaExceededError: the disk is full.
            NodeLostError: it cannot be opened.
            ConfigError: builds are to be bounded, and cannot be.
        """
        async with AsyncExitStack() as stack:
            self.groups.open()
            stack.callback(self.groups.close)
            self.times = await self.context_store.run(StickyTimes, self._times_path)
            stack.callback(self.times.close)
            self.exports.load()
            if self.mounts is not None:
                await stack.enter_async_context(self.mounts)
                self.mounts.serve(self._daemon)
            if self._gate is not None:
                await stack.enter_async_context(self._gate)
            await stack.enter_async_context(self._daemon)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    def busy(self) -> bool:
        """Whether a build uses the project's BuildKit."""
        return self._users > 0

    @property
    def idle_seconds(self) -> float:
        """For how long no build has used it; 0 while one does."""
        return 0.0 if self._users else time.monotonic() - self._idle_since

    async def platforms(self) -> tuple[str, ...]:
        """Return what BuildKit can build now; empty when it does not run or does not answer."""
        with contextlib.suppress(NodeLostError):
            if self._daemon.running:
                return (await self._daemon.client.info()).platforms
        return ()

    @property
    def socket(self) -> Path | None:
        """Where BuildKit listens; None while it does not run."""
        return self._daemon.client.socket_path if self._daemon.running else None

    def _leases(self) -> Path | None:
        pid = self._daemon.pid
        return None if pid is None else leases_folder(pid)

    @contextmanager
    def reporting(self, build: BuildEgress) -> Iterator[None]:
        """Tell a build what it reaches in the network and is refused."""
        if self.place.desk is None:
            yield
        else:
            with self.place.desk.reporting(build):
                yield

    async def reported(self) -> None:
        """Wait until a build that has failed was told what it was refused."""
        if self.place.desk is not None:
            await self.place.desk.settled()

    @property
    def urls(self) -> UrlPolicy | None:
        """What sources and, behind a proxy, steps may fetch now; None to ask nobody."""
        return self.place.urls()

    def touch(self) -> None:
        """Note that a build is about to use it."""
        self._idle_since = time.monotonic()

    @property
    def uploads(self) -> UploadQueue | None:
        """The queue to the shared store; None without one."""
        return self._node_store.uploads

    def cache_problem(self) -> str:
        """Return why the shared store is away; empty when it is not."""
        return self._node_store.shared_problem

    @asynccontextmanager
    async def use(self) -> AsyncIterator[BuildkitClient]:
        """Keep BuildKit running; starts it, also after a crash.

        Raises:
            ConfigError: buildkitd is missing.
            NodeLostError: it does not start.
        """
        self._users += 1
        try:
            if self._wipe_due and self._users == 1:
                await self._wipe()
            await self.place.ready()
            await self._daemon.ensure_running()
            yield self._daemon.client
        finally:
            self._users -= 1
            self._idle_since = time.monotonic()
            self.own_results.built()

    @contextmanager
    def building(self, build: BuildMounts) -> Iterator[None]:
        """Have cache mounts filled for the steps of a build, and stored when it has worked."""
        if self.mounts is None:
            yield
        else:
            with self.mounts.building(build):
                yield

    async def warm_up(self) -> None:
        """Start BuildKit ahead of a build; a failure is told by the build itself."""
        with contextlib.suppress(OffloadError):
            async with self.use():
                pass

    @asynccontextmanager
    async def shared_key(self, base: str, alike: str = "") -> AsyncIterator[str]:
        """Return the key of BuildKit's copy of the local sources, for one build at a time.

        Parallel builds of one kind get a slot each, so they do not undo each other's copy.

        Args:
            base: what the key begins with.
            alike: builds with this text are taken for one whose directory was renamed: one that
                has no copy yet goes on with that of another. Empty for none.

        Raises:
            QuotaExceededError: the disk is full.
        """
        if alike:
            base = await self._renamed(base, alike)
        slot = 0
        while (key := f"{base}-{slot}") in self._keys_in_use:
            exported = self._keys_in_use[key]
            if exported is not None:
                # An export needs the key for a moment only; another copy would cost more.
                exported.hurry.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(EXPORT_WAIT_SECONDS):
                        await exported.released.wait()
                if key not in self._keys_in_use:
                    break
            slot += 1
        self._keys_in_use[key] = None
        try:
            generation = self.times.known_generation(key)
            if not generation:
                generation = await self.context_store.run(self.times.generation, key)
            yield f"{key}-{generation}"
        finally:
            exported = self._keys_in_use.pop(key)
            if exported is not None:
                exported.released.set()

    async def _renamed(self, base: str, alike: str) -> str:
        before = self._alike.pop(alike, base)
        if before != base and not await self.context_store.run(self.times.knows, f"{base}-0"):
            base = before
        self._alike[alike] = base
        if len(self._alike) > MAX_ALIKE:
            del self._alike[next(iter(self._alike))]
        return base

    def exporting(self, shared_key: str, hurry: asyncio.Event) -> None:
        """Note that a build has ended and its key is held only until its export has begun.

        Args:
            shared_key: of the build.
            hurry: is set when the next build waits for the key.
        """
        for key in self._keys_in_use:
            if shared_key.startswith(f"{key}-"):
                self._keys_in_use[key] = _ExportKey(hurry)

    async def wipe_ingest(self) -> bool:
        """Remove half-fetched content that has turned out to be damaged.

        It must not be taken away from builds that fetch something now: then it is done before
        the next build that has BuildKit to itself.

        Returns:
            Whether it is done.
        """
        self._wipe_due = True
        if self._users == 1:
            await self._wipe()
        return not self._wipe_due

    async def _wipe(self) -> None:
        self._wipe_due = False
        removed = await self._daemon.wipe_ingest()
        log.warning("buildkit.ingest.wiped", project_id=self.project_id, files=removed)

    async def buildkit_bytes(self) -> int:
        """Return what BuildKit's own cache takes; 0 when it does not run.

        Raises:
            NodeLostError: it does not answer.
        """
        if not self._daemon.running:
            return 0
        return sum(record.size_bytes for record in await self._daemon.client.disk_usage())

    async def rest(self) -> None:
        """Stop BuildKit when it has been idle for long, and enforce the bound of the context."""
        self.groups.sweep()
        if self.own_results.look_due and self._daemon.running and not self.busy:
            self.own_results.look(await self._daemon.client.disk_usage())
        if self.idle_seconds > self._idle_stop_seconds and self._daemon.running:
            await self._daemon.stop()
            await self.context_store.trim()
            log.info(
                "buildkit.stopped",
                project_id=self.project_id,
                trust_domain=self.domain.name,
                reason="idle",
            )
        elif self.context_store.trim_due:
            freed = await self.context_store.trim()
            log.info("context.trimmed", project_id=self.project_id, freed_bytes=freed)
